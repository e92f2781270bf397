r"""Training a flow: regress the velocity on noised samples.

With the symbols of :mod:`ifpyro.flow.axes.schedule`, one step draws data ``x_0``, noise ``n`` and times ``t``, and
descends

.. math:: \| F(\cos\theta\,x_0/s + \sin\theta\,n,\; t) - (\sin\theta\,x_0/s - \cos\theta\,n) \|^2 ,

plain mean squared error in the angle (v-prediction; Salimans & Ho 2022). Times are stratified, and denser near the data
end, where the likelihood is decided: an error of ``F`` at angle ``theta`` costs ``cot(theta)`` times its square
in nats. What is kept is the exponential moving average with the lowest validation loss; since the network starts at
zero, the result is never worse there than the Gaussian with the data's mean and covariance.
"""

from .fitting import fit
from .recipe import Recipe

__all__ = ["Recipe", "fit"]
