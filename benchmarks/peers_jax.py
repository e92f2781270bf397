"""A trained flow and its posterior in JAX: the same weights, grid and arithmetic, for samplers that live there.

Every sampler is a generator of blocks of latents; whoever times it takes as many as the budget allows. Positions of the
chains are latents ``z ~ N(0, I)`` a priori, as for our own samplers, and likelihoods are normal on columns of ``x``.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import blackjax
import blackjax.smc.resampling as resampling
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import torch
from blackjax.smc import extend_params
from jax import Array, lax
from jax.scipy.special import logsumexp
from numpyro.infer import MCMC, NUTS

import ifpyro
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.fidelity import Level, at

CHAINS = 64


class Block(NamedTuple):
    """What a sampler hands over."""

    z: np.ndarray  # (chains, draws, D)
    log_weight: np.ndarray | None = None  # (chains, draws)
    fresh: bool = False  # stands alone: earlier blocks were runs of their own


def port(flow: ifpyro.InflationaryFlow, level: Level = "fine") -> Callable[[Array], Array]:
    """``decode`` of a flow with an MLP, real or in the unit interval, at a fidelity: ``(n, D)`` to ``(n, E)``."""
    network = flow.velocity
    if not isinstance(network, MLP) or str(flow.support) not in ("None", "Interval(lower_bound=0.0, upper_bound=1.0)"):
        raise ValueError(f"port expects an MLP, and a real or unit-interval support, got {network}, {flow.support}")
    with at(level):
        solved = flow.map.steps(torch.empty(0)).to_data
    tableau = solved[0].tableau
    stages = [[_array(torch.stack(v)) for v in (step.embedding, step.rate)] for step in solved]
    embedding, rate = (jnp.stack(v) for v in zip(*stages, strict=True))
    weight = {name: _array(value) for name, value in network.state_dict().items()}
    basis = {name: _array(value) for name, value in flow.basis.state_dict().items()}
    width, silu = network.width, jax.nn.silu

    def velocity(y: Array, e: Array) -> Array:
        h = y @ weight["inlet.weight"].T + e[:width]
        for k in range(network.blocks):
            gain, shift = e[width * (2 * k + 1) : width * (2 * k + 2)], e[width * (2 * k + 2) : width * (2 * k + 3)]
            inner = silu((silu(h) @ weight[f"first.{k}.weight"].T) * gain + shift)
            h = h + inner @ weight[f"second.{k}.weight"].T
        return silu(h) @ weight["outlet.weight"].T + weight["outlet.bias"]

    def combine(y: Array, weights: tuple[float, ...], values: list[Array]) -> Array:
        return y + sum((w * k for w, k in zip(weights, values, strict=True) if w), jnp.zeros_like(y))

    def step(y: Array, constants: tuple[Array, Array]) -> tuple[Array, None]:
        values: list[Array] = []
        for i, row in enumerate(tableau.a):
            values.append(constants[1][i] * velocity(combine(y, row, values), constants[0][i]))
        return combine(y, tableau.b, values), None

    def decode(z: Array) -> Array:
        v, _ = lax.scan(step, z, (embedding, rate))
        x = basis["mean"] + basis["unit"] * ((v * basis["scale"]) @ basis["rotation"].T)
        return x if flow.support is None else jax.nn.sigmoid(x)

    return decode


class Target(NamedTuple):
    """A posterior over latents: columns of ``x`` seen with normal noise."""

    decode: Callable[[Array], Array]
    guide: Callable[[Array], Array]
    columns: Array
    y: Array
    noise: float
    dim: int

    def log_likelihood(self, z: Array, *, guide: bool = False) -> Array:
        """Shape ``(n,)`` for ``z`` of shape ``(n, D)``."""
        x = (self.guide if guide else self.decode)(z)
        residual = (x[:, self.columns] - self.y) / self.noise
        return -0.5 * (residual**2 + jnp.log(2 * jnp.pi * self.noise**2)).sum(-1)

    def log_density(self, z: Array, *, guide: bool = False) -> Array:
        """Up to the constant of the prior, ``(n,)``."""
        return self.log_likelihood(z, guide=guide) - 0.5 * (z**2).sum(-1)

    def single(self, z: Array) -> Array:
        """The same for one latent ``(D,)``: a scalar."""
        return self.log_density(z[None])[0]


def target(
    flow: ifpyro.InflationaryFlow, columns: list[int], y: torch.Tensor, noise: float, guide: Level = "fine"
) -> Target:
    """The posterior, and its guide: that of our own samplers, if they are to be matched."""
    return Target(port(flow), port(flow, guide), jnp.array(columns), _array(y), noise, flow.latent_dim)


# -- samplers ----------------------------------------------------------------------------------------------------------


def numpyro_nuts(target: Target, seed: int, warmup: int = 60, block: int = 5) -> Iterator[Block]:
    """NumPyro's NUTS, 64 chains by ``chain_method="vectorized"``, trees of depth 5 at most."""

    def model() -> None:
        z = numpyro.sample("z", numpyro.distributions.Normal(jnp.zeros(target.dim), 1.0).to_event(1))
        numpyro.factor("y", target.log_likelihood(z[None])[0])

    mcmc = MCMC(
        NUTS(model, max_tree_depth=5),
        num_warmup=warmup,
        num_samples=block,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.warmup(jax.random.PRNGKey(seed))
    while True:
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(mcmc.post_warmup_state.rng_key)
        yield Block(np.asarray(mcmc.get_samples(group_by_chain=True)["z"]))


def blackjax_chees(target: Target, seed: int, warmup: int = 60, block: int = 10) -> Iterator[Block]:
    """BlackJAX's ChEES adaptation and dynamic HMC, 64 chains from the prior.

    The harmonic mean of acceptances follows the worst chain of a posterior with several modes: step sizes fall below
    0.01, so that without `max_leapfrog_steps` a transition takes hundreds of steps and the warm-up minutes.
    """
    key, start, adapt = jax.random.split(jax.random.PRNGKey(seed), 3)
    positions = jax.random.normal(start, (CHAINS, target.dim))
    adaptation = blackjax.chees_adaptation(
        target.single, CHAINS, max_leapfrog_steps=16, mass_matrix_estimation="diagonal"
    )
    (states, parameters), _ = adaptation.run(adapt, positions, 0.1, optax.adam(0.05), warmup)
    kernel = jax.vmap(blackjax.dynamic_hmc(target.single, **parameters).step)

    def one(states: Any, key: Array) -> tuple[Any, Array]:
        states, _ = kernel(jax.random.split(key, CHAINS), states)
        return states, states.position

    run = jax.jit(lambda states, keys: lax.scan(one, states, keys))
    while True:
        key, now = jax.random.split(key)
        states, z = run(states, jax.random.split(now, block))
        yield Block(np.asarray(z).swapaxes(0, 1))


def blackjax_smc(target: Target, seed: int, sizes: tuple[int, ...] = (1024, 4096, 16384)) -> Iterator[Block]:
    """BlackJAX's adaptive tempered SMC with HMC moves; a run of its own for every number of particles."""
    for particles in sizes:
        key, start = jax.random.split(jax.random.PRNGKey(seed))
        parameters = {
            "step_size": 0.3 * target.dim**-0.25,
            "inverse_mass_matrix": jnp.ones(target.dim),
            "num_integration_steps": 5,
        }
        smc = blackjax.adaptive_tempered_smc(
            lambda z: -0.5 * (z**2).sum(-1),
            lambda z: target.log_likelihood(z[None])[0],
            blackjax.hmc.build_kernel(),
            blackjax.hmc.init,
            extend_params(parameters),
            resampling.systematic,
            target_ess=0.5,
            num_mcmc_steps=10,
        )
        step = jax.jit(smc.step)
        state = smc.init(jax.random.normal(start, (particles, target.dim)))
        while float(state.tempering_param) < 1:
            key, now = jax.random.split(key)
            state, _ = step(now, state)
        log_weight = jnp.log(state.weights)[None]
        yield Block(np.asarray(state.particles)[None], np.asarray(log_weight), fresh=True)


class Tuned(NamedTuple):
    """What a warmed-up `ifpyro.HMC` has learned, as arrays."""

    start: np.ndarray  # (chains, D)
    step_size: float
    length: float
    most_steps: int
    scale: np.ndarray
    reference: dict[str, np.ndarray] | None  # of the independence proposal


def our_hmc(target: Target, seed: int, tuned: Tuned, block: int = 10) -> Iterator[Block]:
    """Our sampling phase in JAX: trajectories by the guide, fine acceptance, one independence jump a transition."""
    scale = jnp.asarray(tuned.scale)
    push, pull = (
        (lambda w: w * scale, lambda g: g * scale) if scale.ndim == 1 else (lambda w: w @ scale.T, lambda g: g @ scale)
    )
    gradient = jax.grad(lambda z: target.log_density(z, guide=True).sum())
    log_density = target.log_density

    def accept(key: Array, log_ratio: Array, new: tuple[Array, ...], old: tuple[Array, ...]) -> tuple[Array, ...]:
        yes = jnp.log(jax.random.uniform(key, log_ratio.shape)) < log_ratio
        return tuple(jnp.where(yes[:, None] if a.ndim == 2 else yes, a, b) for a, b in zip(new, old, strict=True))

    def transition(state: tuple[Array, Array, Array], inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        (q, lp, g), (key, jitter) = state, inputs
        keys = jax.random.split(key, 4)
        p = jax.random.normal(keys[0], q.shape)
        eps = tuned.step_size
        steps = jnp.clip(jnp.ceil(2 * jitter * tuned.length / eps).astype(int), 1, tuned.most_steps)

        def leap(_: int, at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, p, g = at
            p = p + 0.5 * eps * pull(g)
            x = x + eps * push(p)
            g = gradient(x)
            return x, p + 0.5 * eps * pull(g), g

        x, r, h = lax.fori_loop(0, steps, leap, (q, p, g))
        new = log_density(x)
        q, lp, g = accept(keys[1], new - lp - 0.5 * (r**2).sum(-1) + 0.5 * (p**2).sum(-1), (x, new, h), (q, lp, g))
        if tuned.reference is not None:
            x, log_forward, log_back = jump(keys[2], q)
            new = log_density(x)
            q, lp, g = accept(keys[3], new - lp + log_back - log_forward, (x, new, gradient(x)), (q, lp, g))
        return (q, lp, g), q

    jump = _jumps(tuned.reference, target.dim)
    run = jax.jit(lambda state, inputs: lax.scan(transition, state, inputs))
    q = jnp.asarray(tuned.start)
    state = (q, log_density(q), gradient(q))
    key, index = jax.random.PRNGKey(seed), 1
    while True:
        key, now = jax.random.split(key)
        jitter = jnp.array([_van_der_corput(i) for i in range(index, index + block)])
        state, z = run(state, (jax.random.split(now, block), jitter))
        index += block
        yield Block(np.asarray(z).swapaxes(0, 1))


def _jumps(reference: dict[str, np.ndarray] | None, dim: int) -> Callable[[Array, Array], tuple[Array, Array, Array]]:
    """``(key, q)`` to a proposal and the log-densities of the proposal there and at ``q``: see ifpyro.infer."""
    if reference is None:
        return lambda key, q: (q, q[:, 0], q[:, 0])
    r = {name: jnp.asarray(value) for name, value in reference.items()}
    components, bandwidth, prior = len(r["reference"]), r["bandwidth"], float(r["prior"])

    def log_density(q: Array) -> Array:
        squared = ((q @ r["inverse"].T - r["centre"]).reshape(len(q), components, dim) ** 2).sum(-1)
        constant = dim * (jnp.log(bandwidth) + 0.5 * jnp.log(2 * jnp.pi))
        mixture = logsumexp(-0.5 * squared / bandwidth**2 - r["log_det"] - constant, axis=1) + jnp.log(1 / components)
        normal = -0.5 * (q**2).sum(-1) - 0.5 * dim * jnp.log(2 * jnp.pi)
        return jnp.logaddexp(mixture + jnp.log(1 - prior), normal + jnp.log(prior))

    def jump(key: Array, q: Array) -> tuple[Array, Array, Array]:
        keys = jax.random.split(key, 4)
        index = jax.random.randint(keys[0], (len(q),), 0, components)
        noise = jnp.einsum("nij,nj->ni", r["factor"][index], jax.random.normal(keys[1], q.shape))
        local = r["reference"][index] + bandwidth * noise
        from_prior = jax.random.uniform(keys[2], (len(q), 1)) < prior
        x = jnp.where(from_prior, jax.random.normal(keys[3], q.shape), local)
        return x, log_density(x), log_density(q)

    return jump


def _van_der_corput(index: int) -> float:
    return int(f"{index:b}"[::-1], 2) / 2 ** index.bit_length()


def _array(value: torch.Tensor) -> Array:
    return jnp.asarray(value.detach().numpy())
