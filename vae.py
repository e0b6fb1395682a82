"""Frames <-> latents: the autoencoder of Stable Diffusion in plain PyTorch.

The paper (Sec. 3, "Feature Extraction") encodes every video frame by itself with the Gaussian VAE of Stable Diffusion:
8 times smaller in height and width, 4 channels. The architecture is CompVis' / diffusers' `AutoencoderKL`; one
dataclass of sizes makes it the published 84 M parameter network (the defaults) or the small one in `weights/`.

In this order: VAEConfig, the blocks, Encoder and Decoder, VAE (encode, decode), fingerprint, the training loss, `load`
for our files and published ones, and `python vae.py convert IN OUT.safetensors`.
Letters: B batch, T video frames, C latent channels, H W height and width of the latents, 8H 8W of the frames.
"""

import hashlib
import math
import os
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import cmmd
from cmmd import check_fields, fast_autocast, fit_tensors, number, read_tensors, zeroed


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder. The defaults are those of `stabilityai/sd-vae-ft-mse`.

    channels: width of each level, the picture halves between two; blocks: residual blocks a level (the decoder has one
    more); groups: of every GroupNorm; scale, shift, one or one a channel: `encode` gives (mean - shift) * scale."""

    channels: tuple = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    scale: float | tuple = 0.18215
    shift: float | tuple = 0.0

    def __post_init__(self):
        check_fields(self)
        if self.groups < 1 or not self.channels or any(c < 1 or c % self.groups for c in self.channels):
            raise ValueError(f"VAE channels {self.channels} must each be a multiple of groups = {self.groups}")
        scale, shift = torch.as_tensor(self.scale), torch.as_tensor(self.shift)
        if any(x.numel() not in (1, self.latent_channels) for x in (scale, shift)):
            raise ValueError(f"VAE scale and shift must be one number, or {self.latent_channels}: one a latent channel")
        if self.blocks < 1 or self.latent_channels < 1 or not scale.min() > 0:
            raise ValueError("VAE blocks and latent_channels must be at least 1, scale above 0")

    @property
    def factor(self):
        """How many times smaller than the frames the latents are, per side."""
        return 2 ** (len(self.channels) - 1)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        N, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, C, H, W) -> (N, H*W, C)
        h = F.scaled_dot_product_attention(*(f(h)[:, None] for f in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(N, C, H, W)


class Middle(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(c, c, groups), ResidualBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def level(c_in, c_out, blocks, groups, downsample=False, upsample=False):
    """One level: residual blocks, then, if asked, a convolution that halves the size, padded at the right and bottom
    only, or one after nearest neighbours at twice the size. Its parts are named as in the published weights."""
    parts = OrderedDict(resnets=nn.Sequential(
        *(ResidualBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))))
    if downsample:
        half = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c_out, c_out, 3, stride=2))
        parts["downsamplers"] = nn.Sequential(nn.Sequential(half))
    if upsample:
        twice = OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c_out, c_out, 3, padding=1))
        parts["upsamplers"] = nn.Sequential(nn.Sequential(twice))
    return nn.Sequential(parts)


class Encoder(nn.Module):
    """Frames (N, 3, 8H, 8W) -> mean and log-variance (N, 2C, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, groups, last = config.channels, config.groups, len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(*(level(widths[max(i - 1, 0)], c, config.blocks, groups, downsample=i < last)
                                         for i, c in enumerate(widths)))
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (N, C, H, W) -> frames (N, 3, 8H, 8W)."""

    def __init__(self, config):
        super().__init__()
        widths, groups, last = config.channels[::-1], config.groups, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.Sequential(*(level(widths[max(i - 1, 0)], c, config.blocks + 1, groups, upsample=i < last)
                                       for i, c in enumerate(widths)))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The Gaussian autoencoder: `encode` frames to latents, `decode` them back, a few frames at a time."""

    Config = VAEConfig

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        C = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * C, 2 * C, 1), nn.Conv2d(C, C, 1)

    def moments(self, x):
        """Frames (N, 3, 8H, 8W) -> mean, log-variance of the latents, each (N, C, H, W), before scale and shift."""
        mean, log_variance = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def reconstruct(self, z):
        """Latents (N, C, H, W) before scale and shift -> frames (N, 3, 8H, 8W)."""
        return self.decoder(self.post_quant_conv(z)).float()

    @torch.no_grad()
    def encode(self, frames, sample=False, generator=None, chunk=None):
        """Frames (B, T, 3, 8H, 8W) in [-1, 1] -> latents (B, T, C, H, W), about zero mean and unit variance.

        The mean of the Gaussian; with `sample` a draw from it. `chunk` frames at a time bound the memory: by
        default as many as hold 2^16 pixels, on a GPU 2^20."""
        if frames.dim() != 5 or frames.shape[2] != 3 or any(n % self.config.factor for n in frames.shape[3:]):
            raise ValueError(f"encode needs frames (B, T, 3, H, W), H and W multiples of {self.config.factor}; "
                             f"got {tuple(frames.shape)}")
        scale, shift = self._scale_and_shift(frames.device)

        def one(x):
            mean, log_variance = self.moments(x)
            if sample:
                noise = torch.randn(mean.shape, generator=generator).to(mean)
                mean = mean + torch.exp(log_variance / 2) * noise
            return (mean - shift) * scale

        with fast_autocast(frames.device):
            return _in_chunks(one, frames, chunk, frames.shape[3] * frames.shape[4])

    @torch.no_grad()
    def decode(self, latents, chunk=None):
        """Latents (B, T, C, H, W) as `encode` gives them -> frames (B, T, 3, 8H, 8W) in [-1, 1]; `chunk` as there.

        In float32, but within a caller's autocast: in bf16 that of `weights/` loses 1.2 dB, its encoder nothing."""
        if latents.dim() != 5 or latents.shape[2] != self.config.latent_channels:
            raise ValueError(f"decode needs latents (B, T, {self.config.latent_channels}, H, W); "
                             f"got {tuple(latents.shape)}")
        scale, shift = self._scale_and_shift(latents.device)
        pixels = latents.shape[3] * latents.shape[4] * self.config.factor**2
        return _in_chunks(lambda z: self.reconstruct(z / scale + shift).clamp(-1, 1), latents, chunk, pixels)

    def _scale_and_shift(self, device):
        """The config's two, shaped (1 or C, 1, 1)."""
        return [torch.as_tensor(x, device=device).reshape(-1, 1, 1) for x in (self.config.scale, self.config.shift)]


def fingerprint(vae):
    """8 hex digits that change with what decides about latents: the encoder, scale and shift, not the decoder; the same
    for weights stored in half precision."""
    weights = (w for part in (vae.encoder, vae.quant_conv) for w in part.state_dict().values())
    sizes = repr((vae.config.scale, vae.config.shift)).encode()
    return hashlib.sha256(b"".join(w.half().float().cpu().numpy().tobytes() for w in weights) + sizes).hexdigest()[:8]


def to_frames(video: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (..., H, W, 3), array or tensor -> float32 (..., 3, H, W) in [-1, 1]."""
    return torch.as_tensor(video).movedim(-1, -3).contiguous().float() / 127.5 - 1


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Inverse of `to_frames`, rounded: float (..., 3, H, W) in [-1, 1] -> uint8 array (..., H, W, 3)."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def _in_chunks(function, x, chunk, pixels):
    """function over x (B, T, ...) seen as one long row of frames of so many pixels, `chunk` at a time. Into one result:
    pieces and their concatenation would take twice its memory."""
    chunk = chunk or max(1, 2 ** (16 if x.device.type == "cpu" else 20) // pixels)
    rows, out, start = x.flatten(0, 1), None, 0  # (B, T, C, H, W) -> (B*T, C, H, W)
    for part in rows.split(chunk):
        done = function(part.contiguous(memory_format=torch.channels_last))
        out = done.new_empty(len(rows), *done.shape[1:]) if out is None else out
        out[start : start + len(done)] = done
        start += len(done)
    return out.unflatten(0, x.shape[:2])


@torch.no_grad()
def quick_start(vae, frames):
    """Prepare a fresh VAE for a short training, in place (ours): it starts as one that averages 8x8 pixels and enlarges
    them again with a blur, with the gain and offset of each colour fitted to `frames` (N, 3, 8H, 8W) in [-1, 1].

    One channel for each of R, G, B passes through every layer untouched, in a GroupNorm group of its own whose other
    channels start with biases of +-2, so that the norms hide neither brightness nor contrast; residual branches start
    as nothing and latents with little noise. After the 1,600 steps of `train.py vae` PSNR is 30.0 dB on `bounce` and
    25.3 dB on `dance`, from the usual initialisation 24.1 and 20.8 dB."""
    if min(vae.config.latent_channels, *vae.config.channels) < 3:
        raise ValueError("a fresh VAE starts with a channel for each of R, G, B: give it at least 3 channels and "
                         f"latent_channels, not {vae.config.channels} and {vae.config.latent_channels}")
    place = lambda width, k: k * (width // max(3, vae.config.groups)) if width > 3 else k  # the first of group k
    blur = torch.tensor([1.0, 2.0, 1.0]) / 4
    for name, module in vae.named_modules():  # what each convolution on the way does to the three channels
        if isinstance(module, (ResidualBlock, Attention)):
            zeroed(module.conv2 if isinstance(module, ResidualBlock) else module.to_out)
        if not isinstance(module, nn.Conv2d) or not name.endswith(("conv_in", ".conv", "conv_shortcut", "conv_out")):
            continue
        (c_out, c_in, size, _), last = module.weight.shape, name.endswith("conv_out")
        kernel = (F.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1)) if "downsamplers" in name
                  else blur[:, None] * blur if "upsamplers" in name
                  else F.pad(torch.full((1, 1), 2.0 if name.startswith("decoder.conv_") else 1.0), [size // 2] * 4))
        if last:
            module.weight.mul_(0.1)
        else:
            module.bias.copy_(2.0 - 4.0 * (torch.arange(c_out) % 2))
        for k in range(3):
            row, column = k if last else place(c_out, k), k if name == "decoder.conv_in" else place(c_in, k)
            module.weight[row] = 0.0
            module.weight[row, column] = kernel
            module.bias[row] = -kernel.sum() * F.silu(torch.tensor(2.0)) if last else 0.0  # what the norm's bias adds
    for norm in (vae.encoder.conv_norm_out, vae.decoder.conv_norm_out):
        norm.bias.fill_(2.0)  # SiLU is nearly straight there
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(zeroed(conv).weight)  # the identity
    vae.quant_conv.weight[vae.config.latent_channels :] = 0.0
    vae.quant_conv.bias[vae.config.latent_channels :] = -6.0
    out, last = vae.reconstruct(vae.moments(frames)[0]), vae.decoder.conv_out  # what comes out, to be fitted by a line
    x, y = (z.transpose(0, 1).flatten(1) for z in (out, frames))  # (N, 3, 8H, 8W) -> (3, N*8H*8W)
    gain = ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1) / x.var(1)
    last.weight.mul_(gain[:, None, None, None])
    last.bias.copy_(gain * (last.bias - x.mean(1)) + y.mean(1))
    return vae


def vae_loss(vae, frames, kl_weight=1e-6):
    """Training loss over frames (N, 3, 8H, 8W) in [-1, 1] -> loss, reconstruction (N, 3, 8H, 8W).

    Twice the squared error, the absolute one, a quarter of the gradients' at two scales, and a faint KL term (ours)."""
    mean, log_variance = vae.moments(frames)
    out = vae.reconstruct(mean + torch.exp(log_variance / 2) * torch.randn_like(mean))
    error = out - frames
    gradients = sum(e.diff(dim=d).abs().mean() for e in (error, F.avg_pool2d(error, 2)) for d in (2, 3))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
    return (error**2).mean() * 2 + error.abs().mean() + 0.25 * gradients + kl_weight * kl, out


# ---- Files

WHOLE = "first_stage_model."  # what precedes the VAE's names in a whole Stable Diffusion checkpoint
OLD_DIFFUSERS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # our names -> theirs
COMPVIS = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "resnets": "block",
           "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
           "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut", "down_blocks": "down", "up_blocks": "up",
           "downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out"}
KNOWN_FILES = {  # a piece of a tensor's name -> what a file with it looks like
    "quantize.": "a VQ autoencoder (the Gaussian one is needed)",
    "time_embed": "a diffusion U-Net without its autoencoder",
    "text_model.": "a text encoder",
    ".attn.": "an autoencoder with attention inside its levels",
    "model.1.": "a MelGAN vocoder (see vocoder.py)",
    "coder.mid": "a changed AutoencoderKL",
}


def load(path: str | os.PathLike, *, scale=None, shift=None, groups: int | None = None) -> VAE:
    """A `VAE` in evaluation mode, float32, from one of our safetensors files or from a published Gaussian autoencoder.

    The latter by diffusers' names (`AutoencoderKL`; old or new ones of attention) or CompVis' (alone or in a whole
    Stable Diffusion checkpoint), as `.safetensors` or a pickle of nothing but tensors. Sizes are read off the tensors.
    What those don't tell: `scale` (0.18215, that of Stable Diffusion 1 and 2) and `shift` (0) as in VAEConfig, `groups`
    (32, or what the widths share with 32). A file without quant_convs (Stable Diffusion 3, Flux) gets identities.
    Raises ValueError, in one line, for a file that is missing or holds anything else."""
    tensors = read_tensors(path, "VAE", _relevant)
    given = {k: x for k, x in (("scale", scale), ("shift", shift), ("groups", groups)) if x is not None}
    if tensors is None:
        if given:
            raise ValueError(f"{path}: carries its own settings, {', '.join(given)} cannot be given")
        return cmmd.load(path, VAE)
    theirs = _naming(tensors)
    try:
        config = VAEConfig(**_sizes(tensors, theirs) | given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not any("quant_conv" in name for name in tensors):
        for name, n in (("quant_conv", 2 * config.latent_channels), ("post_quant_conv", config.latent_channels)):
            tensors |= {theirs(name + ".weight"): torch.eye(n)[..., None, None], theirs(name + ".bias"): torch.zeros(n)}
    with torch.device("meta"):  # no random weights
        vae = VAE(config)
    names = {theirs(name, len(config.channels)): name for name in vae.state_dict()}
    return fit_tensors(path, tensors, names, vae, "Gaussian autoencoder", KNOWN_FILES)


def _relevant(names):
    """Names without what only a training needs; of a whole checkpoint those of its VAE."""
    names = [n for n in names if n.startswith(WHOLE)] or names
    return [n for n in names if not n.removeprefix(WHOLE).startswith(("loss.", "model_ema."))]


def _naming(tensors):
    """A function: our name of a tensor -> its name in this file (a decoder's also takes the number of levels)."""
    prefix = WHOLE if any(n.startswith(WHOLE) for n in tensors) else ""
    compvis = any(re.search(r"coder\.(mid|down|up)\.", n) for n in tensors)
    table = COMPVIS if compvis else OLD_DIFFUSERS if any(".query." in n for n in tensors) else {}

    def theirs(name, levels=0):
        if compvis:  # counts the decoder's levels the other way round
            name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
        for our_piece, their_piece in table.items():
            name = name.replace(our_piece, their_piece)
        return prefix + name

    return theirs


def _sizes(tensors, theirs):
    """The fields of VAEConfig that the tensors imply; none, for the published network's, if they don't tell."""
    shape = lambda name: tuple(getattr(tensors.get(theirs(name)), "shape", ()))
    conv1 = lambda level, block: shape(f"encoder.down_blocks.{level}.resnets.{block}.conv1.weight")
    channels, blocks, latent = (), 0, shape("decoder.conv_in.weight")
    while conv1(len(channels), 0):
        channels += conv1(len(channels), 0)[:1]
    while conv1(0, blocks):
        blocks += 1
    if not channels or len(latent) < 2:
        return {}
    return dict(channels=channels, blocks=blocks, latent_channels=latent[1], groups=math.gcd(32, *channels))


def main(argv=None):
    """The command line: `python vae.py convert IN OUT.safetensors`. Exit status 2 and one line for bad input."""
    options = {"scale": (number(), "of IN's latents (0.18215)"), "shift": (number(), "of IN's latents (0)"),
               "groups": (int, "of IN's GroupNorms (32, or what its widths share with 32)")}
    return cmmd.convert("vae.py", load, options, argv)


if __name__ == "__main__":
    sys.exit(main())
