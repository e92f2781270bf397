"""Conditions of a flow: what a user passes beside the samples, and the features by which a flow knows it.

==========  ==============================================  =======================================================
kind        a condition                                     its features
==========  ==============================================  =======================================================
columns     numbers; NaN for what is missing                standardised values, zero where missing; and for every
                                                            column with missing entries whether this one is
labels      integers that name classes                      one column a class, centred
sets        ``(M, k)``: ``M`` elements in no order, rows    mean, spread and number of the elements; the network
            of NaN for absent ones                          sees the elements themselves
==========  ==============================================  =======================================================
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .samples import some

FAR = 0.5
"""How far beyond the training range a condition is called far, in widths of that range."""


class Conditions(nn.Module):
    """What turns conditions ``(*batch, *shape)`` into features ``(*batch, p)``.

    Args:
        shape: Shape of one condition.
        labels: For every entry of a flattened condition that is a label, its values.
        sets: Whether a condition is a set of elements, ``(M, k)``.
    """

    mean: Tensor
    sd: Tensor
    low: Tensor
    high: Tensor
    missing: Tensor
    share: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, shape: Sequence[int], labels: dict[int, list[int]] | None = None, sets: bool = False) -> None:
        super().__init__()
        self.shape, self.labels, self.sets = torch.Size(shape), dict(labels or {}), sets
        columns = self.shape[-1] if sets else self.shape.numel()
        self.numeric = [j for j in range(columns) if j not in self.labels]
        count = len(self.numeric)
        moments = 2 * count + 1 if sets else count
        for name, value in (("mean", 0.0), ("sd", 1.0), ("low", -torch.inf), ("high", torch.inf)):
            self.register_buffer(name, torch.full((count,), value))
        self.register_buffer("missing", torch.zeros(count, dtype=torch.bool))
        for name, value in (("centre", 0.0), ("spread", 1.0)):  # of the features themselves
            self.register_buffer(name, torch.full((moments,), value))
        self.register_buffer("share", torch.zeros(count + sum(map(len, self.labels.values()))))
        self._missing_at: list[int] = []

    @classmethod
    def of(cls, c: Tensor, *, labels: bool | Sequence[int] = False, sets: bool = False) -> "Conditions":
        """Conditions like those of a training, ``(N, *shape)``, as :func:`as_conditions` returns them.

        Raises:
            ValueError: If columns are constant, or rows are not what the kind asks.
        """
        flat = c.reshape(len(c), -1)
        chosen = list(range(flat.shape[1])) if labels is True else [] if labels is False else list(labels)
        values: dict[int, list[int]] = {}
        for j in chosen:
            if not -flat.shape[1] <= j < flat.shape[1]:
                raise ValueError(f"labels expects columns of the condition, 0 to {flat.shape[1] - 1}, got {j}")
            column = flat[:, j % flat.shape[1]]
            if not bool((column == column.round()).all()):
                raise TypeError(
                    f"labels expects whole numbers that name classes, but column {j} of the condition holds others; "
                    "leave it out of labels, or encode the classes as integers"
                )
            values[j % flat.shape[1]] = [int(v) for v in column.unique().tolist()]
        made = cls(c.shape[1:], values, sets).to(c.device)
        rows = c.reshape(-1, c.shape[-1]) if sets else flat[:, made.numeric]
        seen = ~rows.isnan()
        if bool(rows.isinf().any()):
            bad = torch.nonzero(c.reshape(len(c), -1).isinf().any(1)).flatten()
            raise ValueError(
                f"condition expects finite entries (NaN marks missing ones), but {len(bad)} rows hold infinity: rows "
                f"{some(bad)}; drop them, or mark the entries as missing"
            )
        count = seen.sum(0)
        values_or_zero = torch.where(seen, rows, rows.new_zeros(()))
        mean = values_or_zero.sum(0) / count
        sd = (torch.where(seen, rows - mean, rows.new_zeros(())).square().sum(0) / (count - 1).clamp(min=1)).sqrt()
        low = torch.where(seen, rows, torch.inf).amin(0) if len(made.numeric) else mean
        high = torch.where(seen, rows, -torch.inf).amax(0) if len(made.numeric) else mean
        constant = ~(sd > 1e-7 * torch.maximum(low.abs(), high.abs()))
        single = [j for j, options in values.items() if len(options) < 2]
        bad = torch.tensor(sorted([*torch.tensor(made.numeric)[constant.cpu()].tolist(), *single]), dtype=torch.long)
        if len(bad):
            raise ValueError(
                f"condition expects columns that vary, but columns {some(bad)} are constant (or all missing); drop them"
            )
        made.mean, made.sd, made.low, made.high = mean, sd, low, high
        if not sets:
            made.missing = ~seen.all(0)
            made._missing_at = torch.nonzero(made.missing).flatten().tolist()
        made.share = made.share.to(c)
        features = made._raw(c)
        if sets:
            made.centre = features.mean(0)
            spread = features.std(0)
            made.spread = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
        else:
            made.share = torch.cat([(~seen).to(c).mean(0), made._one_hot(flat).mean(0)])
        return made

    @property
    def width(self) -> int:
        """Number ``p`` of features."""
        if self.sets:
            return len(self.centre)
        return len(self.numeric) + len(self._missing_at) + sum(map(len, self.labels.values()))

    @property
    def all_labels(self) -> bool:
        """Whether a condition is nothing but labels, which are integers then."""
        return len(self.labels) == self.shape.numel() and not self.sets

    def forward(self, c: Tensor) -> Tensor:
        """Features ``(*batch, p)`` of conditions ``(*batch, *shape)``."""
        raw = self._raw(c)
        if self.sets:
            return (raw - self.centre) / self.spread
        return raw

    def inputs(self, c: Tensor) -> Tensor:
        """What a network sees, in the shape of a condition: standardised numbers, zero where missing.

        Absent elements of sets stay NaN, by which a network tells them; labels stay as they are.
        """
        if self.sets:
            return (c - self.mean) / self.sd
        flat = c.reshape(*self._batch(c), -1)
        if not self.labels:
            return self._standard(flat).reshape(c.shape)
        parts = list(flat.unbind(-1))
        standard = self._standard(flat[..., self.numeric])
        for k, j in enumerate(self.numeric):
            parts[j] = standard[..., k]
        return torch.stack(parts, -1).reshape(c.shape)

    def check(self, c: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Conditions of a user as a tensor ``(*batch, *shape)``; refuses what training has not seen.

        Raises:
            TypeError: If they are not numbers, or labels are not integers.
            ValueError: On another shape, unseen labels, or missing entries where training had none.
        """
        c = _tensor(c, "c")
        lead = c.ndim - len(self.shape)
        if lead < 0 or c.shape[lead:] != self.shape:
            shape = ", ".join(["*batch", *map(str, self.shape)])
            raise ValueError(f"expected conditions of shape ({shape}), got {tuple(c.shape)}; pass what fit was given")
        if self.all_labels and c.is_floating_point():
            raise TypeError(f"expected labels as integers, got {c.dtype}; convert with c.long()")
        c = c.to(device=device, dtype=dtype)
        if torch._C._functorch.is_functorch_wrapped_tensor(c):  # values cannot decide anything there
            return c
        flat = c.detach().reshape(-1, self.shape.numel())
        for j, options in self.labels.items():
            unseen = flat[:, j][~torch.isin(flat[:, j], flat.new_tensor(options))].unique()
            if len(unseen):
                raise ValueError(
                    f"expected labels that training has seen, {options[:20]}, got {unseen[:10].tolist()} in column "
                    f"{j}; train with pairs of these classes"
                )
        if not self.sets:
            numbers = flat[:, self.numeric]
            new = torch.nonzero(numbers.isnan().any(0) & ~self.missing).flatten()
            if len(new):
                raise ValueError(
                    f"conditions hold missing entries (NaN) in columns {some(new)}, where training had none; fill them "
                    "in, or train with pairs that miss them"
                )
            self._warn_if_far(numbers)
        return c

    def spec(self) -> dict[str, Any]:
        """Plain data that rebuilds this module, but for its buffers."""
        labels = [[j, values] for j, values in self.labels.items()]
        return {"shape": list(self.shape), "labels": labels, "sets": self.sets}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "Conditions":
        """Rebuild from :meth:`spec`; the buffers are to be loaded."""
        return cls(spec["shape"], {int(j): list(values) for j, values in spec["labels"]}, spec["sets"])

    def _batch(self, c: Tensor) -> torch.Size:
        return c.shape[: c.ndim - len(self.shape)]

    def _standard(self, numbers: Tensor) -> Tensor:
        return torch.where(numbers.isnan(), numbers.new_zeros(()), (numbers - self.mean) / self.sd)

    def _raw(self, c: Tensor) -> Tensor:
        if self.sets:
            return self._moments((c - self.mean) / self.sd)
        flat = c.reshape(*self._batch(c), -1)
        numbers = flat[..., self.numeric]
        parts = [self._standard(numbers)]
        if self._missing_at:
            parts.append(numbers[..., self._missing_at].isnan().to(c) - self.share[self._missing_at])
        if self.labels:
            parts.append(self._one_hot(flat) - self.share[len(self.numeric) :])
        return torch.cat(parts, -1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._missing_at = torch.nonzero(self.missing).flatten().tolist()

    def _one_hot(self, flat: Tensor) -> Tensor:
        if not self.labels:
            return flat[..., :0]
        options = [flat[..., j, None] == flat.new_tensor(values) for j, values in self.labels.items()]
        return torch.cat(options, -1).to(flat)

    def _moments(self, elements: Tensor) -> Tensor:
        """Mean, standard deviation and log-number of the elements, ``(*batch, 2 k + 1)``."""
        present = ~elements.isnan().any(-1, keepdim=True)
        count = present.sum(-2).clamp(min=1).to(elements)
        values = torch.where(present, elements, elements.new_zeros(()))
        mean = values.sum(-2) / count
        square = torch.where(present, (values - mean.unsqueeze(-2)).square(), values.new_zeros(())).sum(-2) / count
        return torch.cat([mean, (square + 1e-6).sqrt(), count.log()], -1)

    def _warn_if_far(self, numbers: Tensor) -> None:
        width = self.high - self.low
        beyond = torch.maximum(numbers - self.high, self.low - numbers) / width
        worst = torch.where(beyond.isnan(), -torch.inf, beyond)
        if worst.numel() and bool((worst > FAR).any()):
            row, column = divmod(int(worst.argmax()), worst.shape[1])
            warnings.warn(
                f"condition {row} is far outside the training range: column {self.numeric[column]} lies "
                f"{float(worst[row, column]):.2g} widths of that range beyond it, where the flow was never trained",
                stacklevel=4,
            )


def as_conditions(c: Any, rows: int, labels: bool | Sequence[int] | None, dtype: torch.dtype) -> Tensor:
    """Conditions of a training, one for each of ``rows`` samples, as a tensor ``(N, *shape)``.

    Raises:
        TypeError: If they are not numbers, or labels are not integers, or integers could be labels or counts.
        ValueError: If there are more or fewer than samples.
    """
    c = _tensor(c, "condition")
    if c.ndim == 0 or len(c) != rows:
        found = "one number" if c.ndim == 0 else f"{len(c)} of shape {tuple(c.shape)}"
        raise ValueError(f"condition expects one row for each of the {rows} samples, got {found}")
    if labels is None and not c.is_floating_point():
        raise TypeError(
            f"condition has dtype {c.dtype}: integers may be labels or counts. Pass labels=True if they name classes "
            "(or labels=[columns]), labels=False if they are numbers"
        )
    if labels is True and c.is_floating_point():
        raise TypeError(f"labels=True expects integers that name classes, got {c.dtype}; convert with .astype(int)")
    if c.shape[1:].numel() == 0:
        raise ValueError(f"condition expects at least one column, got shape {tuple(c.shape)}")
    return c.to(dtype)


def _tensor(c: Any, name: str) -> Tensor:
    if not isinstance(c, Tensor):
        array = np.asarray(c)
        if array.dtype.kind not in "fiub":
            raise TypeError(
                f"expected {name} to be an array of numbers, got dtype {array.dtype}; encode categories as integers "
                "and pass labels=True"
            )
        c = torch.as_tensor(np.ascontiguousarray(array).reshape(array.shape))
    if c.is_complex():
        raise TypeError(f"expected {name} to be real, got {c.dtype}; stack real and imaginary parts as columns")
    return c
