"""What all tests share: one torch thread, because the networks are small and the machine may be busy."""

import torch

torch.set_num_threads(1)
