"""Plants the silent bugs of this field one by one, and shows that the suite goes red for each.

    python -m tests.planted_faults            all of them, some minutes
    python -m tests.planted_faults penalty    those with a word in their name

Each fault is one change of one line, the kind that runs, trains and yields plausible numbers. The package is copied, the
line is changed in the copy, and the tests that should see it are run there: a fault that they survive is reported, and the
exit status is 1. The tests themselves are run on the copy without any fault first. This is no part of the quick suite.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """One bug: where it is planted, what it changes, and the tests that should see it."""

    name: str
    path: str  # below genzoo/
    right: str  # occurs once
    wrong: str
    tests: str  # arguments of pytest


FAULTS = [
    # Every family
    Fault(
        "bits/dim forget the offset of the measure, +7 at 256 levels",
        "prob/measure.py",
        "return -log_prob / (dim * math.log(2.0)) + math.log2(levels / 2)",
        "return -log_prob / (dim * math.log(2.0))",
        "tests/prob/test_measure.py tests/metrics",
    ),
    Fault(
        "levels are found by rounding and not by a floor",
        "prob/measure.py",
        "return torch.floor((x + 1.0) * (levels / 2)).clamp_(0, levels - 1).long()",
        "return torch.round((x + 1.0) * ((levels - 1) / 2)).clamp_(0, levels - 1).long()",
        "tests/prob/test_measure.py",
    ),
    Fault(
        "floats become bytes without a clamp, and wrap",
        "prob/measure.py",
        "return torch.floor((x + 1.0) * (levels / 2)).clamp_(0, levels - 1).long()",
        "return torch.floor((x + 1.0) * (levels / 2)).long()",
        "tests/prob/test_measure.py",
    ),
    Fault(
        "averages of weights are not used for evaluation",
        "commands/train.py",
        "score(module.ema.model, subject, run, metrics, network, seed=seed, ema=True)",
        "score(module.model, subject, run, metrics, network, seed=seed, ema=True)",
        "tests/commands/test_train.py tests/commands/test_evaluate.py",
    ),
    Fault(
        "averages of weights have no warm-up",
        "training/ema.py",
        "decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0",
        "decay = self.decay if n else 0.0",
        "tests/training/test_ema.py",
    ),
    Fault(
        "averages of weights leave out the buffers",
        "training/ema.py",
        "torch._foreach_copy_(average_buffers, buffers)",
        "pass",
        "tests/training/test_ema.py",
    ),
    Fault(
        "dropout stays on at evaluation",
        "commands/score.py",
        "    model.eval()\n    status",
        "    model.train()\n    status",
        "tests/commands/test_evaluate.py",
    ),
    Fault(
        "doubled pixels meet mirrored weights",
        "nn/layers.py",
        "self.weight.flip(2, 3)",
        "self.weight",
        "tests/nn/test_networks.py",
    ),
    # VAE and hierarchical VAE
    Fault(
        "the reconstruction is a mean over pixels beside a summed KL, a hidden beta",
        "families/vae.py",
        "distortion = -self.likelihood.log_prob(self.decoder(z, y).to(x.dtype), x).mean()",
        "distortion = -self.likelihood.log_prob(self.decoder(z, y).to(x.dtype), x).mean() / self.dim",
        "tests/families/test_vae.py",
    ),
    Fault(
        "the importance-weighted bound lacks its -log K",
        "prob/bounds.py",
        "value = log_weights.logsumexp(0) - math.log(draws)",
        "value = log_weights.logsumexp(0)",
        "tests/prob/test_bounds.py tests/families/test_vae.py",
    ),
    Fault(
        "a layer's KL is taken from N(0, 1) and not from its learned prior",
        "families/hvae.py",
        "return kl_normal(q.mean, 2 * q.log_std, p.mean, 2 * p.log_std)",
        "return kl_normal(q.mean, 2 * q.log_std)",
        "tests/families/test_hvae.py",
    ),
    Fault(
        "free bits are counted in the reported bound",
        "families/vae.py",
        "return LogProb(log_likelihood - kl_normal(mean, log_var).flatten(1).sum(1))",
        "return LogProb(log_likelihood - kl_normal(mean, log_var).clamp(min=self.cost.free_bits).flatten(1).sum(1))",
        "tests/families/test_vae.py",
    ),
    Fault(
        "the last bin of the discretised logistic does not reach to infinity",
        "prob/likelihoods.py",
        "inner = first + last + torch.log(-torch.expm1(-width))",
        "last = inner = first + last + torch.log(-torch.expm1(-width))",
        "tests/prob/test_likelihoods.py",
    ),
    # Vector quantisation
    Fault(
        "straight-through on the wrong side",
        "nn/quantize.py",
        "return z + (e - z).detach()",
        "return e + (z - e).detach()",
        "tests/nn/test_quantize.py tests/families/test_vqvae.py",
    ),
    Fault(
        "the codebook's averages are updated at evaluation",
        "families/vqvae.py",
        "rng) if self.training else None",
        "rng)",
        "tests/nn/test_quantize.py tests/families/test_vqvae.py",
    ),
    Fault(
        "dead codes are never revived",
        "nn/quantize.py",
        "dead = (self.counts < self.revival * mean) | ~self.placed",
        "dead = ~self.placed.expand_as(self.counts)",
        "tests/nn/test_quantize.py",
    ),
    Fault(
        "channels and places are mixed when vectors are flattened",
        "nn/quantize.py",
        "z_ND = z_BDHW.movedim(1, -1).flatten(0, -2)\n            # |z",
        "z_ND = z_BDHW.reshape(-1, z_BDHW.shape[1])\n            # |z",
        "tests/nn/test_quantize.py tests/families/test_vqvae.py",
    ),
    Fault(
        "the reported bound leaves out the prior of the codes",
        "families/latent.py",
        "return LogProb(log_likelihood + value + self.measure.log_det() - log_q, stderr)",
        "return LogProb(log_likelihood - log_q, stderr)",
        "tests/families/test_latent.py",
    ),
    Fault(
        "the density of standardised latents forgets its Jacobian",
        "families/latent.py",
        "return -self.places * self.std.log().sum()",
        "return 0 * self.std.log().sum()",
        "tests/families/test_latent.py",
    ),
    # Autoregressive models
    Fault(
        "a pixel sees itself",
        "nn/pixelcnn.py",
        "v, h = F.pad(x[:, :, :-1], (0, 0, 1, 0)), F.pad(x[..., :-1], (1, 0))",
        "v, h = F.pad(x[:, :, :-1], (0, 0, 1, 0)), x",
        "tests/nn/test_pixelcnn.py",
    ),
    Fault(
        "the vertical stack is cut off, which leaves a blind spot",
        "nn/pixelcnn.py",
        "return _gate(features + e), self.link(features)",
        "return _gate(features + e), 0 * self.link(features)",
        "tests/nn/test_pixelcnn.py",
    ),
    Fault(
        "samples are put together column by column",
        "families/autoregressive.py",
        "x = torch.stack(pixels, dim=2).view(n, *self.raster)",
        "x = torch.stack(pixels, dim=2).view(n, *self.raster).transpose(2, 3)",
        "tests/families/test_autoregressive.py",
    ),
    # GANs
    Fault(
        "the penalty's norm is taken over the batch as well",
        "families/gan.py",
        "return (gradient.flatten(1).norm(dim=1) - 1).square().mean()",
        "return (gradient.norm() - 1).square().mean()",
        "tests/families/test_gan.py",
    ),
    Fault(
        "the penalty has no second derivative",
        "families/gan.py",
        "create_graph=True",
        "create_graph=False",
        "tests/families/test_gan.py",
    ),
    Fault(
        "one place between data and samples serves the whole batch",
        "families/gan.py",
        "a = a.view(-1, *[1] * (x.ndim - 1))",
        "a = a[0]",
        "tests/families/test_gan.py",
    ),
    Fault(
        "Wasserstein's distance has the wrong sign",
        "families/gan.py",
        "loss = self.penalty * penalty - distance",
        "loss = self.penalty * penalty + distance",
        "tests/families/test_gan.py",
    ),
    # Flows
    Fault(
        "a coupling's log-determinant has the wrong sign",
        "families/realnvp.py",
        "b, log_det = b * log_scale.exp() + shift, log_scale.flatten(1).sum(1)",
        "b, log_det = b * log_scale.exp() + shift, -log_scale.flatten(1).sum(1)",
        "tests/families/test_realnvp.py",
    ),
    Fault(
        "the logit's log-determinant forgets the squeeze to [.05, .95]",
        "prob/transforms.py",
        "log_det = F.softplus(z) + F.softplus(-z) + math.log(0.5 - self.margin)",
        "log_det = F.softplus(z) + F.softplus(-z) + math.log(0.5)",
        "tests/prob/test_transforms_and_divergences.py",
    ),
    Fault(
        "sampling does not undo the squeeze",
        "prob/transforms.py",
        "return (torch.sigmoid(z) - self.margin) / (0.5 - self.margin) - 1",
        "return 2 * torch.sigmoid(z) - 1",
        "tests/prob/test_transforms_and_divergences.py",
    ),
    Fault(
        "the initialisation of activation norms is lost on a resume",
        "nn/coupling.py",
        'self.register_buffer("initialized", torch.tensor(False))',
        'self.register_buffer("initialized", torch.tensor(False), persistent=False)',
        "tests/families/test_glow.py tests/nn",
    ),
    Fault(
        "the log-determinant of a 1x1 convolution is counted once and not for each pixel",
        "families/glow.py",
        "log_det = math.prod(self.sides) * (self.norm.log_scale.sum() + self.mix.log_det)",
        "log_det = math.prod(self.sides) * self.norm.log_scale.sum() + self.mix.log_det",
        "tests/families/test_glow.py",
    ),
    # DDPM
    Fault(
        "the data's estimate is clipped, but the noise is not computed anew",
        "samplers.py",
        "x = step.renoised(x, x0, max(step.sigma_s**2 - drawn, 0.0) ** 0.5)",
        "x = step.alpha_s * x0 + step.sigma_s * ask.denoiser.eps(x, torch.full((len(x),), step.t).double(), ask.y)",
        "tests/test_samplers.py",
    ),
    Fault(
        "noise is added at the last step",
        "samplers.py",
        "            if not step.last:\n                z = randn",
        "            if True:\n                z = randn",
        "tests/test_samplers.py",
    ),
    Fault(
        "the first index has a posterior variance of its own, zero",
        "families/ddpm.py",
        "floor = Step(*self._chain[1].tolist()).posterior_var",
        "floor = 1e-20",
        "tests/families/test_ddpm.py",
    ),
    Fault(
        "betas do not scale with the number of steps",
        "prob/schedules.py",
        "scale = 1000 / num_steps",
        "scale = 1.0",
        "tests/prob/test_schedules.py",
    ),
    Fault(
        "betas of the cosine schedule are not capped",
        "prob/schedules.py",
        "super().__init__((1 - abar[1:] / abar[:-1]).clamp(max=0.999))",
        "super().__init__((1 - abar[1:] / abar[:-1]).clamp(max=0.999999))",
        "tests/prob/test_schedules.py",
    ),
    Fault(
        "the bound's gradient reaches the mean in the hybrid objective",
        "families/ddpm.py",
        "prediction = prediction._replace(mean=prediction.mean.detach())",
        "pass",
        "tests/families/test_ddpm.py",
    ),
    # Score-based models and flow matching
    Fault(
        "the standard deviation of the sub-VP SDE is a root",
        "prob/schedules.py",
        "return Coefficients(alpha, -torch.expm1(2 * log_alpha), alpha * slope, -2 * alpha**2 * slope)",
        "return Coefficients(alpha, (-torch.expm1(2 * log_alpha)).sqrt(), alpha * slope, -2 * alpha**2 * slope)",
        "tests/prob/test_schedules.py",
    ),
    Fault(
        "Hutchinson's probe is drawn anew at each evaluation",
        "probability_flow.py",
        "None if probes is None else probes[:, rows].flatten(2)",
        "None if probes is None else torch.randn_like(probes[:, rows]).sign().flatten(2)",
        "tests/test_probability_flow.py",
    ),
    Fault(
        "one adaptive step serves the whole batch",
        "prob/solvers.py",
        "accepted = error <= 1",
        "accepted = (error <= 1) & (error.max() <= 1)",
        "tests/prob/test_solvers.py",
    ),
    Fault(
        "the second evaluation of guidance is not counted",
        "samplers.py",
        "self.nfe += self.denoiser.evaluations",
        "self.nfe += 1",
        "tests/test_samplers.py",
    ),
    Fault(
        "the score has the wrong sign",
        "prob/paths.py",
        "return 0.0, -1 / sigma, -alpha / sigma",
        "return 0.0, 1 / sigma, alpha / sigma",
        "tests/prob/test_paths.py",
    ),
    Fault(
        "a path with paired noise says that it has a score",
        "families/flow_matching.py",
        "independent=not paired",
        "independent=True",
        "tests/families/test_flow_matching.py",
    ),
    Fault(
        "optimal transport minimises distances and not their squares",
        "families/flow_matching.py",
        "eps.flatten(1).float()).square()",
        "eps.flatten(1).float())",
        "tests/families/test_flow_matching.py",
    ),
    Fault(
        "the classes do not follow the pairing",
        "families/flow_matching.py",
        "return eps[torch.from_numpy(order).to(eps.device)]",
        "return eps[torch.from_numpy(order).argsort().to(eps.device)]",
        "tests/families/test_flow_matching.py",
    ),
    # Metrics
    Fault(
        "covariances divide by n",
        "metrics/frechet.py",
        "products(centred.T, centred.T) / max(len(x) - 1, 1)",
        "products(centred.T, centred.T) / max(len(x), 1)",
        "tests/metrics/test_frechet.py",
    ),
    Fault(
        "streamed covariances divide by n",
        "metrics/frechet.py",
        "self.packed[2:] / max(n - 1, 1)",
        "self.packed[2:] / max(n, 1)",
        "tests/metrics/test_frechet.py",
    ),
    Fault(
        "joined sets forget the distance of their means",
        "metrics/frechet.py",
        "joined[2:].addr_(delta, delta, alpha=float(n_a * n_b / n))",
        "pass",
        "tests/metrics/test_frechet.py",
    ),
    Fault(
        "the root of the product is counted once",
        "metrics/frechet.py",
        "trace - 2 * squared.clamp(min=0).sqrt().sum()",
        "trace - squared.clamp(min=0).sqrt().sum()",
        "tests/metrics/test_frechet.py",
    ),
    Fault(
        "few features divide by n",
        "metrics/frechet.py",
        "R = (x - mean).T / max(N - 1, 1) ** 0.5",
        "R = (x - mean).T / N**0.5",
        "tests/metrics/test_frechet.py",
    ),
    Fault(
        "the extrapolation stops at one set and not at none",
        "metrics/frechet.py",
        "return float(means.mean() - slope * counts.mean())",
        "return float(means.mean() - slope * (counts.mean() - 1))",
        "tests/metrics/test_frechet.py",
    ),
    Fault(
        "the distance's error forgets the means",
        "metrics/frechet.py",
        "influence = 2 * centred @ (p.mean - q.mean) + centred",
        "influence = centred",
        "tests/metrics/test_frechet.py",
    ),
    Fault(
        "pairs of a point with itself are counted",
        "metrics/kernel.py",
        "within_x = (k_xx.sum() - k_xx.trace()) / (n * (n - 1))",
        "within_x = k_xx.sum() / (n * n)",
        "tests/metrics/test_kernel.py",
    ),
    Fault(
        "subsets are drawn with replacement",
        "metrics/kernel.py",
        "rng.choice(len(fake), size, replace=False)",
        "rng.choice(len(fake), size, replace=True)",
        "tests/metrics/test_kernel.py",
    ),
    Fault(
        "a feature is its own nearest neighbour",
        "metrics/manifold.py",
        "d.fill_diagonal_(torch.inf)  # itself",
        "pass",
        "tests/metrics/test_manifold.py",
    ),
    Fault(
        "density is not divided by the number of neighbours",
        "metrics/manifold.py",
        "density=balls / (k_coverage * len(fake))",
        "density=balls / len(fake)",
        "tests/metrics/test_manifold.py",
    ),
    Fault(
        "recall takes the radii of the first block for all",
        "metrics/manifold.py",
        "(d < around_fake[rows, None])",
        "(d < around_fake[rows - rows[0], None])",
        "tests/metrics/test_manifold.py",
    ),
    Fault(
        "mirror images are not looked at",
        "metrics/memorisation.py",
        "sides = [x, x.flip(-1)] if flip else [x]",
        "sides = [x]",
        "tests/metrics/test_memorisation.py",
    ),
    Fault(
        "a training event is its own nearest neighbour",
        "metrics/memorisation.py",
        "d[rows - rows[0], own[rows]] = torch.inf",
        "pass",
        "tests/metrics/test_memorisation.py",
    ),
    Fault(
        "one copy is enough to be flagged",
        "metrics/memorisation.py",
        "> SURE * (2 * p * (1 - p) / self.copied.n) ** 0.5",
        "> 0",
        "tests/metrics/test_memorisation.py",
    ),
    Fault(
        "quantiles are not sorted",
        "metrics/transport.py",
        "a, b = a.sort(-1).values, b.sort(-1).values",
        "a, b = a.sort(-1).values, b",
        "tests/metrics/test_transport.py",
    ),
    Fault(
        "directions cover a quarter of the circle",
        "metrics/transport.py",
        "(math.pi / directions)",
        "(math.pi / 2 / directions)",
        "tests/metrics/test_transport.py",
    ),
    Fault(
        "samples are split without a shuffle",
        "metrics/inception_score.py",
        "order = np.random.RandomState(SEED).permutation(N)",
        "order = np.arange(N)",
        "tests/metrics/test_inception_score.py",
    ),
    Fault(
        "a class that no sample has makes the score NaN",
        "metrics/inception_score.py",
        ".nan_to_num(0.0).sum(1)",
        ".sum(1)",
        "tests/metrics/test_inception_score.py",
    ),
    Fault(
        "a small classifier stays in training mode",
        "metrics/features.py",
        "        self.network.load_state_dict(load(content))\n        self.network.eval()",
        "        self.network.load_state_dict(load(content))\n        self.network",
        "tests/metrics/test_features.py",
    ),
    Fault(
        "images are made smaller without antialiasing",
        "metrics/features.py",
        '(side, side), mode="bilinear", antialias=True',
        '(side, side), mode="bilinear", antialias=False',
        "tests/metrics/test_features.py",
    ),
    Fault(
        "bytes reach the classifier on [0, 1]",
        "metrics/features.py",
        "self.network(x / 127.5 - 1)",
        "self.network(x / 255)",
        "tests/metrics/test_features.py",
    ),
    Fault(
        "a download is not checked",
        "metrics/features.py",
        "    if found != INCEPTION_SHA256:\n",
        "    if False:\n",
        "tests/metrics/test_features.py",
    ),
    Fault(
        "weights are unpickled whole",
        "metrics/features.py",
        "weights_only=True",
        "weights_only=False",
        "tests/metrics/test_features.py",
    ),
    Fault(
        "another network's distance is called FID",
        "metrics/evaluator.py",
        "    if network.is_inception:\n",
        "    if True:\n",
        "tests/metrics/test_evaluator.py",
    ),
    Fault(
        "a forced distance is not marked",
        "metrics/evaluator.py",
        '{"unit": "squared distance", **protocol, **marked}',
        '{"unit": "squared distance", **protocol}',
        "tests/metrics/test_evaluator.py",
    ),
    Fault(
        "real and generated features are exchanged",
        "metrics/evaluator.py",
        "shape = manifold(real[subset(len(real), n)], x[subset(len(x), n)], K, K_COVERAGE)",
        "shape = manifold(x[subset(len(x), n)], real[subset(len(real), n)], K, K_COVERAGE)",
        "tests/metrics/test_evaluator.py",
    ),
    Fault(
        "the neighbours of the test split are kept without regard to mirror images",
        "metrics/evaluator.py",
        '"test": sha256_of(y), "flip": flip}',
        '"test": sha256_of(y)}',
        "tests/metrics/test_evaluator.py",
    ),
    Fault(
        "references do not depend on the images",
        "metrics/reference.py",
        'key = {"version": VERSION, "images": sha256, "n"',
        'key = {"version": VERSION, "n"',
        "tests/metrics/test_reference.py",
    ),
    Fault(
        "references do not depend on the network",
        "metrics/reference.py",
        '"n": len(images), **network.card, "dtype"',
        '"n": len(images), "dtype"',
        "tests/metrics/test_reference.py",
    ),
    Fault(
        "a cache file's checksum is not compared",
        "metrics/reference.py",
        " or sealed[8:40] != hashlib.sha256(content).digest()",
        "",
        "tests/metrics/test_reference.py",
    ),
    Fault(
        "processes do not wait for each other",
        "metrics/reference.py",
        "        lock.acquire()\n",
        "        raise OSError\n",
        "tests/metrics/test_reference.py",
    ),
    # The comparison
    Fault(
        "errors over seeds divide by n and not by n - 1",
        "report/leaderboard.py",
        "statistics.stdev(values)",
        "statistics.pstdev(values)",
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "the spread of seeds is shown as the error of their mean",
        "report/leaderboard.py",
        "statistics.stdev(values) / math.sqrt(len(values))",
        "statistics.stdev(values)",
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "numbers with unlike protocols are ranked together",
        "report/leaderboard.py",
        "if name in b and a[name] != b[name]",
        "if name in b and a[name] is None",
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "scores of runs that failed are averaged too",
        "report/leaderboard.py",
        'for result in record.results if record.state == "done" else ():',
        "for result in record.results:",
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "few seeds are taken for many in the test of a difference",
        "report/leaderboard.py",
        "freedom = 1 / share if share > 0 else math.inf",
        "freedom = 1e9",
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "a seed that is scored twice counts twice",
        "report/leaderboard.py",
        'found.setdefault(key(record.config.get("seed")), {}).update(metrics)',
        "found[str(len(found))] = metrics",
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "speeds of unlike machines are ranked",
        "report/leaderboard.py",
        "c.protocol == cells[0].protocol and c.better for c in cells",
        "c.better for c in cells",
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "runs of unlike budgets become one row",
        "report/records.py",
        '    ("budget", "samples"),\n',
        '    ("budget",),\n',
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "texts of a run are formulas of a spreadsheet",
        "report/texts.py",
        'c[:1] in "=+-@\\t\\r"',
        'c[:1] in "="',
        "tests/report/test_leaderboard.py",
    ),
    Fault(
        "a run's title is HTML",
        "report/assets/index.html",
        "<h1>{{ title }}</h1>",
        "<h1>{{ title | safe }}</h1>",
        "tests/report/test_page.py",
    ),
    Fault(
        "templates escape nothing",
        "report/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/report/test_page.py",
    ),
    Fault(
        "labels are markup for plots",
        "report/assets/page.js",
        'String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")',
        "String(text)",
        "tests/report/test_page.py",
    ),
    Fault(
        "the Pareto front is of those that are beaten",
        "report/assets/page.js",
        "points.filter((p) => !points.some(",
        "points.filter((p) => points.some(",
        "tests/report/test_page.py",
    ),
    Fault(
        "the page sorts what has no number as zero",
        "report/assets/page.js",
        "row.cells[state.by]?.mean ?? null;",
        "row.cells[state.by]?.mean ?? 0;",
        "tests/report/test_page.py",
    ),
    Fault(
        "attention is not counted among the operations",
        "training/flops.py",
        "custom_mapping=_mapping()",
        "custom_mapping={}",
        "tests/training/test_flops.py",
    ),
    Fault(
        "the generator's turns cost what the critic's cost",
        "training/module.py",
        "kind = stage, turn",
        "kind = stage, None",
        "tests/training/test_module.py",
    ),
    Fault(
        "a failure of wandb ends the run",
        "training/steadfast.py",
        "        except Exception as error:\n            self.lost = True",
        "        except KeyError as error:\n            self.lost = True",
        "tests/commands/test_loggers.py::test_an_outage_of_wandb_changes_nothing_in_the_run",
    ),
    # Runs that survive, and files that cannot harm
    Fault(
        "the step is left out of the noise's key",
        "training/module.py",
        'seed_of("noise", self.seed, self.steps, ranks.rank())',
        'seed_of("noise", self.seed, 0, ranks.rank())',
        "tests/training/test_module.py",
    ),
    Fault(
        "checkpoints are not forced onto the disk",
        "training/checkpoints.py",
        "        os.fsync(file.fileno())\n",
        "",
        "tests/training/test_checkpoints.py",
    ),
    Fault(
        "a checkpoint is deleted under its own name",
        "training/checkpoints.py",
        "    os.replace(checkpoint, aside)\n    shutil.rmtree(aside)",
        "    shutil.rmtree(checkpoint)",
        "tests/training/test_checkpoints.py",
    ),
    Fault(
        "the trained weights are saved as the averaged ones",
        "training/checkpoints.py",
        "save_safetensors(_weights(ema))",
        "save_safetensors(_weights(model))",
        "tests/training/test_checkpoints.py",
    ),
    Fault(
        "a checksum is written and never compared",
        "training/checkpoints.py",
        "if hashlib.sha256(data).hexdigest() != sha256:",
        "if not sha256:",
        "tests/training/test_checkpoints.py",
    ),
    Fault(
        "state is unpickled by whatever it names",
        "training/checkpoints.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        "tests/test_hostile_files.py",
    ),
    Fault(
        "a run may name whatever lies beside genzoo's own",
        "commands/trust.py",
        "if target not in may or",
        'if not target.startswith(tuple(name.rpartition(".")[0] for name in may)) or',
        "tests/test_hostile_files.py",
    ),
    Fault(
        "links below the top of a run are not seen",
        "runs.py",
        "if name.as_posix() not in links:",
        "if False:",
        "tests/test_hostile_trees.py",
    ),
    Fault(
        "a link that is put there at the last moment is followed",
        "runs.py",
        'for name in ("O_NOFOLLOW", "O_NONBLOCK"',
        'for name in ("O_NONBLOCK"',
        "tests/test_hostile_trees.py",
    ),
    Fault(
        "what has another name elsewhere is appended to",
        "runs.py",
        "if append and found.st_nlink > 1:",
        "if append and found.st_nlink > 9:",
        "tests/test_hostile_trees.py",
    ),
    Fault(
        "a broken stream of an archive is a bug of ours",
        "data/arrays.py",
        "zipfile.LargeZipFile, zlib.error, lzma",
        "zipfile.LargeZipFile, lzma",
        "tests/data/test_malformed_arrays.py",
    ),
    Fault(
        "steps before the first are accepted",
        "training/restored.py",
        "if type(value) is not int or not least <= value <= most:",
        "if type(value) is not int:",
        "tests/commands/test_resume_hostile.py",
    ),
    Fault(
        "moments of an optimiser may have any shape",
        "training/restored.py",
        "if tuple(value.shape) != shape or",
        "if",
        "tests/commands/test_resume_hostile.py",
    ),
    Fault(
        "a run has as many threads as it says",
        "commands/train.py",
        'min(its_status(old).get("threads") or threads, os.cpu_count() or 1)',
        'its_status(old).get("threads") or threads',
        "tests/commands/test_resume_hostile.py",
    ),
    Fault(
        "a score needs no value",
        "report/records.py",
        '        _must("value" in entry, where, f"{key}.value", "is missing")\n',
        '        entry.setdefault("value", None)\n',
        "tests/report/test_hostile_records.py",
    ),
    Fault(
        "optimisers begin anew where a run goes on",
        "training/module.py",
        "            optimizer.load_state_dict(of_optimizer)",
        "            optimizer.load_state_dict(optimizer.state_dict())",
        "tests/commands/test_resume.py::test_a_run_that_goes_on_ends_in_the_same_bits[vae]",
    ),
    Fault(
        "averages forget how many updates they had",
        "training/module.py",
        'self.ema.updates = dict(state["ema_updates"])',
        'self.ema.updates = dict.fromkeys(state["ema_updates"], 0)',
        "tests/commands/test_resume.py::test_a_run_that_goes_on_ends_in_the_same_bits[vae]",
    ),
    Fault(
        "losses since the last record are lost where a run goes on",
        "training/module.py",
        '"window": self.window.state(),',
        '"window": {},',
        "tests/commands/test_resume.py::test_a_run_is_gone_on_with_twice_from_where_a_signal_stopped_it",
    ),
    Fault(
        "what was recorded after the checkpoint is kept",
        "runs.py",
        "kept = file.read(size)",
        "kept = file.read()",
        "tests/commands/test_resume.py::test_a_run_that_goes_on_ends_in_the_same_bits[vae]",
    ),
    Fault(
        "two processes may train one run",
        "runs.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/commands/test_resume.py::test_a_live_run_has_one_writer_and_a_dead_one_none",
    ),
    Fault(
        "a signal ends a run without a checkpoint",
        "training/callbacks.py",
        "if isinstance(exception, Stopped) and not",
        "if isinstance(exception, KeyboardInterrupt) and not",
        "tests/commands/test_resume.py::test_a_run_is_gone_on_with_twice_from_where_a_signal_stopped_it",
    ),
    Fault(
        "a run that was stopped leaves with 0",
        "training/stopping.py",
        "self.exit_code = 128 + number",
        "self.exit_code = 0",
        "tests/commands/test_resume.py::test_a_run_is_gone_on_with_twice_from_where_a_signal_stopped_it",
    ),
    Fault(
        "a quarter of the noise keeps to half of its bin",
        "prob/random.py",
        "random_(-(2**63), None, generator=rng)",
        "random_(generator=rng)",
        "tests/prob/test_random.py",
    ),
    Fault(
        "short gradients are shortened and long ones are not",
        "training/module.py",
        "or not norm.item() + 1e-6 <= self.clip",
        "or norm.item() + 1e-6 <= self.clip",
        "tests/training/test_module.py",
    ),
    Fault(
        "gradients are not looked at",
        "training/module.py",
        "elif not (math.isfinite(loss.total.item()) and math.isfinite(norm.item())):",
        "elif not math.isfinite(loss.total.item()):",
        "tests/commands/test_not_finite.py",
    ),
    Fault(
        "half a line stays where the disk was full",
        "runs.py",
        "                file.truncate(before)  # half a line would spoil the next one\n",
        "",
        "tests/commands/test_resources.py::test_a_line_that_a_full_disk_has_cut_is_taken_back",
    ),
    Fault(
        "a lack of memory is a bug",
        "commands/train.py",
        "if isinstance(error, MemoryError | torch.OutOfMemoryError) or",
        "if isinstance(error, torch.OutOfMemoryError) and",
        "tests/commands/test_resources.py::test_memory_that_gives_out_names_the_batch_and_what_to_try",
    ),
    Fault(
        "a password in an address is kept",
        "redact.py",
        'return f"{scheme}{MARK}@"',
        "return match[0]",
        "tests/test_redact.py",
    ),
    Fault(
        "the page takes a title for markup",
        "report/assets/index.html",
        "<h1>{{ title }}</h1>",
        "<h1>{{ title | safe }}</h1>",
        "tests/report/test_page.py",
    ),
    Fault(
        "processes keep their own gradients",
        "training/module.py",
        "[mean.view_as(g) for mean, g in zip(averages, gradients, strict=True)]",
        "gradients",
        "tests/training/test_processes.py::test_two_processes_train_as_one",
    ),
    Fault(
        "processes train on the same share",
        "data/loader.py",
        "start = step * self.batch_size + self.rank * share",
        "start = step * self.batch_size",
        "tests/training/test_processes.py::test_two_processes_train_as_one",
    ),
    Fault(
        "batch norm takes the moments of its own share",
        "nn/layers.py",
        "ranks.pool(*torch.var_mean(h, dim=(0, 2, 3), correction=0))",
        "torch.var_mean(h, dim=(0, 2, 3), correction=0)",
        "tests/test_ranks.py",
    ),
    Fault(
        "a codebook counts its own share",
        "nn/quantize.py",
        "self.counts.lerp_(ranks.all_sum(counts), 1 - self.decay)",
        "self.counts.lerp_(counts, 1 - self.decay)",
        "tests/test_ranks.py",
    ),
    Fault(
        "activation norms begin with their own share",
        "nn/coupling.py",
        "ranks.pool(*torch.var_mean(x_BCHW, dim=(0, 2, 3), correction=0))",
        "torch.var_mean(x_BCHW, dim=(0, 2, 3), correction=0)",
        "tests/test_ranks.py",
    ),
]


def run(folder: Path, tests: str) -> tuple[bool, str]:
    """Run tests on a copy of the package; return whether they pass, and the last line of what they say."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode in (0, 1), f"these tests cannot be run: {tests}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.returncode == 0, failed[0] if failed else done.stdout.strip().splitlines()[-1]


def main(words: list[str]) -> int:
    """Plant the faults whose names hold all the words; return how many survived."""
    chosen = [fault for fault in FAULTS if all(word in fault.name for word in words)]
    survived, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "genzoo")
        ignored = shutil.ignore_patterns("outputs", "multirun", "__pycache__", ".git", "data")
        shutil.copytree(ROOT, folder, ignore=lambda path, names: ignored(path, names) if Path(path) == ROOT else [])
        for fault in chosen:
            found = (folder / "genzoo" / fault.path).read_text().count(fault.right)
            assert found == 1, f"{fault.path} holds {found} times: {fault.right}"
        for tests in sorted({path for fault in chosen for path in fault.tests.split()}):
            passed, said = run(folder, tests)
            assert passed, f"{tests} fails without any fault: {said}"
        for i, fault in enumerate(chosen, 1):
            source = folder / "genzoo" / fault.path
            text = source.read_text()
            source.write_text(text.replace(fault.right, fault.wrong))
            passed, said = run(folder, fault.tests)
            source.write_text(text)
            survived += [fault] if passed else []
            print(
                f"{i:2}/{len(chosen)} {'SURVIVED' if passed else 'red'}: {fault.name}\n        {said[:140]}", flush=True
            )
    minutes = (time.monotonic() - begun) / 60
    print(f"{len(chosen) - len(survived)} of {len(chosen)} faults turn the suite red ({minutes:.1f} minutes)")
    return len(survived)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
