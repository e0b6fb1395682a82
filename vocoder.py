"""The vocoder: wave -> log-mel -> wave, and what trains it.

In this order: the sizes (`VocoderConfig`), the mel front end (`mel_filters`, `log_mel`), the generator (`Vocoder`), the
discriminators (`Discriminator`), the losses, distances and the baseline without a network (`griffin_lim`), `load` for
our own and for published weights, and the command `python vocoder.py convert IN OUT.safetensors`.

Front end, generator and discriminators are those of MelGAN (Kumar et al. 2019, arXiv 1910.06711; reference code
descriptinc/melgan-neurips), whose outputs they equal to within rounding; the losses are those of HiFi-GAN (Kong et al.
2020, arXiv 2010.05646, Eq. 1-6), whose weights the CMMD paper takes (Sec. 3).

Letters: `B` batch, `M` mel bins, `L` mel frames, `S` samples, `C` channels, `F` frequency bins.
Waves are float (B, S) in [-1, 1]; mels are log10 of a magnitude, float (B, M, L), between -5 and about 2.
"""

import math
import os
import re
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import cmmd
from cmmd import check_fields, check_mel, check_plain, fit_tensors, no_autocast, number, read_tensors

FLOOR = 1e-5  # magnitudes below it count as silence: log10 -> -5
SLOPE = 0.2  # of every leaky ReLU
CHUNK = 256  # mel frames computed at a time


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the mel front end (the first six) and of the generator. The window is as long as `n_fft`.

    Raises ValueError for values that don't fit together; `ratios`, the upsampling factors, must multiply to `hop`."""

    sample_rate: int = 16000  # Hz
    n_fft: int = 512  # samples, 32 ms
    hop: int = 256  # samples, 16 ms
    mel_bins: int = 80
    f_min: float = 0.0  # Hz
    f_max: float = 8000.0  # Hz
    base: int = 32  # channels at full rate; twice as many at each lower rate
    ratios: tuple = (8, 8, 2, 2)
    residual_blocks: int = 3  # per rate, dilations 1, 3, 9, ...
    mel_mean: float = 0.0  # the generator sees (mel - mel_mean) / mel_std; 0 and 1 for descript's weights
    mel_std: float = 1.0

    def __post_init__(self):
        check_fields(self)
        for name in ("sample_rate", "n_fft", "hop", "mel_bins", "base", "residual_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"VocoderConfig: {name} is {getattr(self, name)}, expected at least 1")
        if not self.mel_std > 0:
            raise ValueError(f"VocoderConfig: mel_std is {self.mel_std}, expected above 0")
        if not self.ratios or min(self.ratios) < 2 or math.prod(self.ratios) != self.hop:
            raise ValueError(f"VocoderConfig: ratios {self.ratios}, each 2 or more, multiply to "
                             f"{math.prod(self.ratios)}, not to hop {self.hop}")
        check_mel(self)


# ---------------------------------------------------------------------------------------------------- mel front end
def mel_filters(config):
    """Triangular filters (M, n_fft//2 + 1) float32, evenly spaced on Slaney's scale (15 mel at 1000 Hz, linear below,
    logarithmic above: 27 mel from 1000 to 6400 Hz), each of unit area over Hz.

    Equals `librosa.filters.mel(sr, n_fft, n_mels, fmin, fmax)` with its defaults."""
    hz, log_step = torch.tensor([config.f_min, config.f_max], dtype=torch.float64), math.log(6.4)
    low, high = torch.where(hz < 1000, hz * 0.015, 15 + 27 * torch.log(hz.clamp(min=1) / 1000) / log_step).tolist()
    mel = torch.linspace(low, high, config.mel_bins + 2, dtype=torch.float64)
    corners = torch.where(mel < 15, mel / 0.015, 1000 * torch.exp((mel - 15) * log_step / 27))  # (M+2,) Hz
    bins = torch.arange(config.n_fft // 2 + 1, dtype=torch.float64) * config.sample_rate / config.n_fft  # (F,) Hz
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


def _spectrum(padded, config):
    """Complex STFT of an already padded wave, periodic Hann window: (B, S + n_fft - hop) -> (B, F, S//hop)."""
    window = torch.hann_window(config.n_fft, device=padded.device)
    return torch.stft(padded, config.n_fft, config.hop, window=window, center=False, return_complex=True)


def log_mel(wave: torch.Tensor, config) -> torch.Tensor:
    """Wave (B, S) in [-1, 1] -> log10 mel magnitude (B, M, S//hop), floored at log10(1e-5) = -5; differentiable.

    Frame j is centred at (j + 1/2) * hop / sample_rate seconds: the wave is mirrored by (n_fft - hop)/2 at either end.
    Equals the `Audio2Mel` of melgan-neurips. Always float32, also under autocast.
    Raises ValueError for other shapes, integers, and waves too short for one frame or for the mirror."""
    if wave.ndim != 2 or not wave.is_floating_point():
        raise ValueError(f"log_mel: expected a float wave (B, S) in [-1, 1], got {wave.dtype} {tuple(wave.shape)}")
    total = config.n_fft - config.hop
    least = max(config.hop, total - total // 2 + 1)
    if wave.shape[1] < least:
        raise ValueError(f"log_mel: {wave.shape[1]} samples are too few, at least {least} are needed")
    with no_autocast(wave.device):
        padded = F.pad(wave.float(), (total // 2, total - total // 2), mode="reflect")
        filters, hop, mels = mel_filters(config).to(wave.device), config.hop, []
        for start in range(0, wave.shape[1] // hop, CHUNK):  # spectra take far more memory than mels
            piece = padded[:, start * hop : (start + CHUNK - 1) * hop + config.n_fft]
            mels.append((filters @ _spectrum(piece, config).abs()).clamp(min=FLOOR).log10())
        return torch.cat(mels, dim=2)


# -------------------------------------------------------------------------------------------------------- networks
def add_weight_norm(module):
    """Reparametrise every convolution inside `module` as length times direction, for training; returns `module`."""
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.ConvTranspose1d)) and not parametrize.is_parametrized(part):
            parametrizations.weight_norm(part)
    return module


def fold_weight_norm(tensors):
    """A state dict with weight norm folded: length * direction / |direction|, the norm over all but the first axis.

    Knows torch's names, present (`parametrizations.weight.original0`, `...1`) and old (`weight_g`, `weight_v`).
    ValueError if a length is not one number a channel, or a direction is 0."""
    folded = dict(tensors)
    for name in tensors:
        for length, direction in (("parametrizations.weight.original0", "parametrizations.weight.original1"),
                                  ("weight_g", "weight_v")):
            stem = name.removesuffix(length)
            if stem != name and stem + direction in tensors:
                g, v = folded.pop(name).float(), folded.pop(stem + direction).float()
                norm = v.norm(dim=tuple(range(1, v.ndim)), keepdim=True)
                if g.shape != norm.shape or not (norm > 0).all():
                    raise ValueError(f"{name} {tuple(g.shape)} and {stem + direction} {tuple(v.shape)} are no weight "
                                     f"norm: expected lengths {tuple(norm.shape)}, and no direction 0")
                folded[stem + "weight"] = g * v / norm
    return folded


def _activate(x, mirror=0):
    """Leaky ReLU, first mirroring `mirror` samples at either end; without a mirror in place: x's last use."""
    return F.leaky_relu(F.pad(x, (mirror, mirror), mode="reflect") if mirror else x, SLOPE, inplace=True)


class ResidualBlock(nn.Module):
    """x (B, C, S) -> shortcut(x) + convolutions(x), same shape; sees `dilation` samples to either side."""

    def __init__(self, channels, dilation):
        super().__init__()
        self.dilated = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.mix = nn.Conv1d(channels, channels, 1)
        self.shortcut = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        y = self.mix(_activate(self.dilated(_activate(x, self.dilated.dilation[0]))))
        return y.add_(self.shortcut(x))


class Vocoder(nn.Module):
    """MelGAN's generator. `Vocoder(config)(mel (B, M, L))` -> wave (B, L*hop) in [-1, 1].

    Built without weight norm: training adds it with `add_weight_norm(vocoder)`; files hold `vocoder.folded()`.
    Initialised as PyTorch does, as is the original in effect: weight norm undoes its normal(0, 0.02)."""

    Config = VocoderConfig

    def __init__(self, config=VocoderConfig()):
        super().__init__()
        self.config = config
        width = config.base * 2 ** len(config.ratios)
        self.first = nn.Conv1d(config.mel_bins, width, 7, padding=3, padding_mode="reflect")
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for r in config.ratios:  # kernel 2r, stride r, and a padding that makes the output exactly r times as long
            self.ups.append(nn.ConvTranspose1d(width, width // 2, 2 * r, r, padding=(r + 1) // 2, output_padding=r % 2))
            width //= 2
            self.blocks.append(nn.Sequential(*(ResidualBlock(width, 3**j) for j in range(config.residual_blocks))))
        self.last = nn.Conv1d(width, 1, 7)

    @property
    def context(self):
        """Mel frames to either side of a frame that its samples can depend on: 7 for ratios (8, 8, 2, 2), 3 blocks."""
        reach = 3  # samples, of the last convolution
        for r in reversed(self.config.ratios):
            reach = math.ceil((reach + sum(3**j for j in range(self.config.residual_blocks))) / r) + 1
        return reach + 3

    @property
    def least_frames(self):
        """The shortest mel that `forward` can mirror at its ends."""
        return max(4, 3 ** (self.config.residual_blocks - 1) // self.config.ratios[0] + 1)

    def forward(self, mel):
        """Mel (B, M, L) as `log_mel` gives it -> wave (B, L*hop) float32. Raises ValueError for other shapes."""
        if mel.ndim != 3 or mel.shape[1] != self.config.mel_bins or mel.shape[2] < self.least_frames:
            raise ValueError(f"Vocoder: expected a mel (B, {self.config.mel_bins}, L), L at least {self.least_frames}, "
                             f"got {tuple(mel.shape)}")
        x = self.first((mel - self.config.mel_mean) / self.config.mel_std)  # (B, C, L)
        for up, blocks in zip(self.ups, self.blocks):
            x = up(_activate(x))  # (B, C, S) -> (B, C/2, S*r)
            for block in blocks:  # one by one: nothing but x stays in memory
                x = block(x)
        return torch.tanh(self.last(_activate(x, 3)).float())[:, 0]  # (B, 1, S) -> (B, S)

    def decode(self, mel, chunk=CHUNK):
        """`forward` without gradients for any L, by `pieces`."""
        return torch.cat([mel.new_zeros(len(mel), 0), *self.pieces(mel, chunk)], 1)

    @torch.no_grad()
    def pieces(self, mel, chunk=CHUNK):
        """`forward` of a mel (B, M, L), `chunk` frames at a time, so that memory does not grow with L: yields waves
        (B, n*hop) that follow each other.

        Each chunk sees `context` frames more to either side, so the result is `forward`'s up to rounding. A mel shorter
        than `least_frames` is lengthened by its last frame first."""
        L, hop, context = mel.shape[2], self.config.hop, self.context
        if 0 < L < self.least_frames:
            mel = F.pad(mel, (0, self.least_frames - L), mode="replicate")
        for start in range(0, L, chunk):
            stop, left = min(start + chunk, L), max(start - context, 0)
            yield self(mel[:, :, left : stop + context])[:, (start - left) * hop : (stop - left) * hop]

    def folded(self):
        """A copy without weight norm, computing the same, as files hold it: `cmmd.save(path, vocoder.folded())`."""
        plain = Vocoder(self.config).to(self.last.bias.device)
        plain.load_state_dict(fold_weight_norm(self.state_dict()))
        return plain.train(self.training)


class Discriminator(nn.Module):
    """MelGAN's multi-scale discriminator, weight-normed: wave (B, S) -> for full, half and quarter rate a list of
    features (B, C, S'), C at most `max_channels`, a multiple of 16; the original's 1024 make 16.9 M parameters.

    The last feature of each scale is its score (B, 1, S'): 1 for real and 0 for made, under the losses below."""

    def __init__(self, max_channels=1024):
        super().__init__()
        if max_channels < 16 or max_channels % 16:
            raise ValueError(f"a discriminator of {max_channels} channels at most: expected a multiple of 16")
        self.scales = add_weight_norm(nn.ModuleList(self._scale(max_channels) for _ in range(3)))

    @staticmethod
    def _scale(most):
        """The convolutions of one scale: wide, four strided and grouped ones, two at the lowest rate."""
        widths = [min(16 * 4**i, most) for i in range(5)]
        last = min(2 * widths[-1], most)
        return nn.ModuleList([
            nn.Conv1d(1, widths[0], 15, padding=7, padding_mode="reflect"),
            *(nn.Conv1d(a, b, 41, 4, padding=20, groups=a // 4) for a, b in zip(widths, widths[1:])),
            nn.Conv1d(widths[-1], last, 5, padding=2), nn.Conv1d(last, 1, 3, padding=1)])

    def forward(self, wave):
        x, results = wave[:, None], []  # (B, S) -> (B, 1, S)
        for convs in self.scales:
            features = [x]
            for conv in convs[:-1]:
                features.append(_activate(conv(features[-1])))
            results.append([*features[1:], convs[-1](features[-1])])
            x = F.avg_pool1d(x, 4, stride=2, padding=1, count_include_pad=False)  # (B, 1, S) -> (B, 1, S/2)
        return results


# ---------------------------------------------------------------------------------------- losses, distances, baseline
def discriminator_loss(real, fake):
    """Least squares, HiFi-GAN Eq. 1, summed over scales: mean (score(real) - 1)^2 + mean score(fake)^2.

    `real` and `fake` are the discriminator's results for the true wave and for the generator's, detached."""
    return sum((r[-1].float() - 1).square().mean() + f[-1].float().square().mean() for r, f in zip(real, fake))


def mel_loss(output, wave, config):
    """HiFi-GAN Eq. 3: mean absolute difference of the natural-log mels (ours are log10) of two waves (B, S). Scalar."""
    return F.l1_loss(log_mel(output, config), log_mel(wave, config)) * math.log(10)


class GeneratorLoss(NamedTuple):
    """`total` = adversarial + 2 features + 45 mel; the parts are unweighted."""

    total: torch.Tensor
    adversarial: torch.Tensor
    features: torch.Tensor
    mel: torch.Tensor


def generator_loss(real, fake, wave, output, config):
    """HiFi-GAN Eq. 2, 3, 4 and 5: how far `output` (B, S) is from passing for `wave` (B, S).

    `real`, `fake` are the discriminator's results for the two. Features are matched over every layer, the score
    included, and summed over layers and scales, as HiFi-GAN does; gradients flow through `output` and `fake` only."""
    adversarial = sum((f[-1].float() - 1).square().mean() for f in fake)
    features = sum(F.l1_loss(b.float(), a.detach().float()) for r, f in zip(real, fake) for a, b in zip(r, f))
    mel = mel_loss(output, wave, config)
    return GeneratorLoss(adversarial + 2 * features + 45 * mel, adversarial, features, mel)


def loud_stft_loss(output, wave):
    """Mean absolute difference of log(1 + 20 |STFT|) of two waves (B, S), over four windows from 256 to 2048. Scalar.

    For the first part of a training (ours): log-mel losses pull hardest where the sound is faintest, since the slope of
    a logarithm is 1/x, and a fresh generator then learns the background before any tone."""
    total = 0
    for n_fft in (256, 512, 1024, 2048):
        window = torch.hann_window(n_fft, device=wave.device)
        a, b = ((1 + 20 * torch.stft(x.float(), n_fft, n_fft // 4, window=window, return_complex=True).abs()).log()
                for x in (output, wave))
        total = total + F.l1_loss(a, b)
    return total / 4


def multi_resolution_stft(output, wave):
    """Distance (B,) of two waves (B, S), not symmetric: `wave` is the truth. 0 for equal ones, about 1 if good.

    Spectral convergence plus mean absolute natural-log magnitude difference, averaged over three resolutions; windows,
    hops and floor of Parallel WaveGAN (arXiv 1910.11480, Eq. 4-6). Raises ValueError if shapes differ or S < 1025."""
    if output.shape != wave.shape or wave.ndim != 2 or wave.shape[1] < 1025:
        raise ValueError(f"multi_resolution_stft: expected two waves (B, S), S at least 1025, "
                         f"got {tuple(output.shape)} and {tuple(wave.shape)}")
    total = 0
    for n_fft, hop, window in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):  # samples
        hann = torch.hann_window(window, device=wave.device)
        a, b = (torch.stft(x.float(), n_fft, hop, window, hann, return_complex=True).abs().clamp(min=1e-7**0.5)
                for x in (output, wave))  # (B, F, L)
        convergence = (b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
        total = total + convergence + (b.log() - a.log()).abs().flatten(1).mean(1)
    return total / 3


def _overlap_add(spectrum, config):
    """Least-squares inverse of `_spectrum`: (B, F, L) -> (B, L*hop + n_fft - hop)."""
    L, n = spectrum.shape[2], config.n_fft
    window = torch.hann_window(n, device=spectrum.device)[:, None]  # (n_fft, 1)
    frames = torch.fft.irfft(spectrum, n, dim=1) * window  # (B, n_fft, L)
    size = dict(output_size=(1, n + (L - 1) * config.hop), kernel_size=(1, n), stride=(1, config.hop))
    weight = F.fold(window.square().expand(n, L)[None], **size)  # (1, 1, 1, S + n_fft - hop)
    return (F.fold(frames, **size) / weight.clamp(min=1e-8))[:, 0, 0]


@torch.no_grad()
def griffin_lim(mel, config, iterations=32, seed=0, momentum=0.99):
    """The baseline: mel (B, M, L) -> wave (B, L*hop), no network (Griffin and Lim 1984; momentum: Perraudin 2013).

    Magnitudes are the non-negative ones that the mel fits best (100 multiplicative updates); phases start at random."""
    filters = mel_filters(config).to(mel.device)  # (M, F)
    target = 10 ** mel.float()
    magnitude = filters.T @ target + 1e-8  # (B, F, L)
    for _ in range(100):
        magnitude = magnitude * (filters.T @ target) / (filters.T @ (filters @ magnitude) + 1e-8)
    turns = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed)).to(mel.device)
    phase, before = torch.polar(torch.ones_like(turns), 2 * math.pi * turns), 0
    for _ in range(iterations):
        now = _spectrum(_overlap_add(magnitude * phase, config), config)
        phase = now - momentum / (1 + momentum) * before
        phase, before = phase / phase.abs().clamp(min=1e-12), now
    start = (config.n_fft - config.hop) // 2
    return _overlap_add(magnitude * phase, config)[:, start : start + mel.shape[2] * config.hop]


# ----------------------------------------------------------------------------------------------------------- files
KNOWN_FILES = {  # a piece of a tensor's name -> what a file with it looks like
    "disc_": "MelGAN's discriminator (the generator is needed)",
    "conv_pre": "a HiFi-GAN generator",
    "melgan.": "ParallelWaveGAN's MelGAN, another layout",
    "first.": "a cmmd vocoder without its header",
    "quant_conv": "an image autoencoder (see vae.py)",
    "model.1.": "a changed MelGAN generator",
}


def load(path: str | os.PathLike, *, sample_rate=None, n_fft=None, f_min=None, f_max=None) -> Vocoder:
    """A `Vocoder` in evaluation mode, from one of our safetensors files or from a melgan-neurips generator state dict.

    The latter (`.pt` or `.safetensors`, weight-normed by torch's old or new names, or folded) doesn't say which mel it
    was trained on: fields of `VocoderConfig` that are not given are the original's (sample_rate 22050, n_fft 1024,
    f_min 0, f_max half the sample rate). Every other size is read off the tensors.
    Raises ValueError, in one line, for a file that is missing or holds anything else."""
    tensors = read_tensors(path, "MelGAN vocoder")
    given = dict(sample_rate=sample_rate, n_fft=n_fft, f_min=f_min, f_max=f_max)
    given = {key: x for key, x in given.items() if x is not None}
    if tensors is None:
        if given:
            raise ValueError(f"{path}: carries its own mel settings, {', '.join(given)} cannot be given")
        return cmmd.load(path, Vocoder)
    check_plain(path, {name: x for name, x in tensors.items() if re.search(r"weight(_[gv]|\.original[01])$", name)})
    try:
        tensors = fold_weight_norm(tensors)
        config = _sizes(tensors, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with torch.device("meta"):  # no random weights
        vocoder = Vocoder(config)
    return fit_tensors(path, tensors, published_names(config), vocoder, "MelGAN generator", KNOWN_FILES)


def _sizes(tensors, given):
    """The config that the folded tensors of a melgan-neurips generator imply; its published one if they don't tell."""
    mel = dict(sample_rate=22050, n_fft=1024) | given
    mel.setdefault("f_max", mel["sample_rate"] / 2)
    places = sorted({int(n.split(".")[1]) for n in tensors if re.fullmatch(r"model\.\d+\.(weight|bias)", n)})
    parts = [tensors.get(f"model.{i}.weight", torch.empty(0)) for i in places]  # those outside residual blocks
    if len(parts) < 3 or any(x.ndim != 3 for x in parts):
        return VocoderConfig(**mel)
    first, *ups, last = parts
    ratios = tuple(x.shape[2] // 2 for x in ups)  # kernels are twice the ratio
    return VocoderConfig(mel_bins=first.shape[1], base=last.shape[1], ratios=ratios, hop=math.prod(ratios),
                         residual_blocks=places[-1] - 3 - places[-2], **mel)


def published_names(config):
    """Tensor names of a folded melgan-neurips generator, whose layers are numbered through -> ours."""
    ours, index = {"first": "model.1"}, 2  # 0 is a padding
    for i in range(len(config.ratios)):
        ours[f"ups.{i}"] = f"model.{index + 1}"  # after an activation
        for j in range(config.residual_blocks):
            for name, place in (("dilated", "block.2"), ("mix", "block.4"), ("shortcut", "shortcut")):
                ours[f"blocks.{i}.{j}.{name}"] = f"model.{index + 2 + j}.{place}"
        index += 2 + config.residual_blocks
    ours["last"] = f"model.{index + 2}"  # after an activation and a padding
    return {f"{theirs}.{kind}": f"{name}.{kind}" for name, theirs in ours.items() for kind in ("weight", "bias")}


def main(argv=None):
    """The command line: `python vocoder.py convert IN OUT.safetensors`. Exit status 2 and one line for bad input."""
    text = "the mel that IN was trained on, {}".format
    options = {"sample_rate": (int, text("Hz (22050)")), "n_fft": (int, text("samples (1024)")),
               "f_min": (number(), text("Hz (0)")), "f_max": (number(), text("Hz (half the sample rate)"))}
    return cmmd.convert("vocoder.py", load, options, argv)


if __name__ == "__main__":
    sys.exit(main())
