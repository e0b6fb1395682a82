"""CMMD: contrastive multi-modal diffusion for video-audio conditional modelling (Yang et al., arXiv 2312.05412).

The method of the paper, over tensors: nothing here knows of files of media, frames or waves. In this order:
  schedule     scales, diffuse, velocity and back                                       Sec. 2.1
  the model    CMMDConfig, blocks, EasyFusion, CMMD: two U-Nets side by side            Fig. 1
  losses       joint_loss (Eq. 2), contrastive_loss (Eq. 6), the times of a training    Sec. 2.1, 2.2
  negatives    draw_negatives: shift, splice, swap                                      Sec. 2.2
  sampler      generate: clean, replace or guide (Eqs. 3, 5), or by turns; any length   Sec. 2.1
  the rest     save, load, others' weights, devices, command lines: what serves all files

Letters: B batch, T video frames, C channels, H W latent height and width, M mel bins, L mel frames, E width of the
embedded noise level; in attention N any batch, S and R positions. "velocity" is the v-target of Salimans and Ho; `t` in
[0, 1] is the noise level (the paper's n / N), 0 clean and 1 pure noise; blocks get it embedded, as `time`. Equations:
2 joint v-loss, 3 step guided by a reconstruction, 4 contrastive loss for a clean video, 5 noising of what is given,
6 joint contrastive loss. "(ours)" marks what is not in the paper.
"""

import argparse
import json
import math
import os
import re
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from itertools import count, repeat
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

__version__ = "0.1.0"
__path__ = [os.path.dirname(os.path.abspath(__file__))]  # sibling files import as cmmd.vae, cloned or installed


# ---- Schedule (ours: the paper's appendix would give it). All arithmetic in float32.


def scales(t, like):
    """What signal and noise are multiplied by at t in [0, 1], a number or (B,) -> sqrt(alpha_bar), sqrt(1 - alpha_bar),
    shaped to multiply `like` (B, ...). The schedule: alpha_bar = cos^2(pi t / 2), the share of signal power."""
    angle = torch.as_tensor(t, dtype=torch.float32, device=like.device) * (math.pi / 2)
    angle = angle.reshape(angle.shape + (1,) * (like.dim() - angle.dim()))
    return torch.cos(angle), torch.sin(angle)


def levels(t, shift):
    """The paper's one t for both -> the video's and the audio's noise level. A number, or any shape.

    shift (ours; 1 is the paper's): the picture's ratio of signal to noise, in amplitude, over the sound's. A sound
    whose onsets fill all bins is decided at t near 0.9, where a small thing in a picture of the same t is lost."""
    if shift == 1:
        return t, t
    angle = t * (math.pi / 2)
    if isinstance(t, torch.Tensor):
        return (torch.atan2(angle.sin(), shift * angle.cos()) / (math.pi / 2)).clamp(max=1.0), t
    return math.atan2(math.sin(angle), shift * math.cos(angle)) / (math.pi / 2), t


def diffuse(x, noise, t):
    """Eq. 5: x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise. x, noise (B, ...); t (B,) or a number."""
    signal, sigma = scales(t, x)
    return signal * x + sigma * noise


def velocity(x, noise, t):
    """The target of Eq. 2: sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x. x, noise (B, ...); t (B,) or a number."""
    signal, sigma = scales(t, x)
    return signal * noise - sigma * x


def denoise(x_t, v, t):
    """Inverse of `diffuse` and `velocity`: noisy data and velocity -> (x, noise), exactly."""
    signal, sigma = scales(t, x_t)
    return signal * x_t - sigma * v, sigma * x_t + signal * v


# ---- The model


@dataclass(frozen=True)
class CMMDConfig:
    """What the model was trained on, and its sizes. The defaults are `demo`: 64 px, one laptop.

    size: of the frames in pixels, 8 times that of the latents; frames: a training window's; mel_mean, mel_std: of the
    log10 mel, so that the normalised one is about N(0, 1); video_channels, audio_channels: width of each level;
    blocks: pairs of blocks a level; attention: over time, level by level; fusion: what crosses between the modalities,
    "learned" (pooled where a 1x1 convolution looks), "mean" (spatial mean), "attention" (AttentionFusion) or "none";
    shift: the picture's ratio of signal to noise over the sound's where both share one t (`levels`; nothing to do with
    shifted negatives); latents: `vae.fingerprint` of the autoencoder they come from, where known."""

    size: int = 64
    fps: float = 10
    frames: int = 18
    latent_channels: int = 4
    sample_rate: int = 16000
    n_fft: int = 512
    hop: int = 256
    mel_bins: int = 80
    f_min: float = 0.0
    f_max: float = 8000.0
    mel_mean: float = -2.6
    mel_std: float = 1.3
    video_channels: tuple = (48, 64, 96)
    audio_channels: tuple = (96, 160, 224)
    attention: tuple = (False, True, True)
    blocks: int = 2
    heads: int = 4
    groups: int = 8
    fusion: str = "learned"
    shift: float = 1.0
    latents: str = ""

    @property
    def seconds(self):
        """Of a training window."""
        return self.frames / self.fps

    def normalise(self, mel):
        """log10 mel -> about zero mean and unit variance."""
        return (mel - self.mel_mean) / self.mel_std

    def denormalise(self, x):
        """Inverse of `normalise`."""
        return x * self.mel_std + self.mel_mean

    def __post_init__(self):
        check_fields(self)
        if not len(self.video_channels) == len(self.audio_channels) == len(self.attention) > 0:
            raise ValueError("CMMD needs video_channels, audio_channels and attention of one length, a value a level")
        for name in ("size", "fps", "frames", "latent_channels", "sample_rate", "n_fft", "hop", "mel_bins", "mel_std",
                     "blocks", "heads", "groups", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"CMMD {name} is {getattr(self, name)}, it must be above 0")
        side = 8 * 2 ** (len(self.attention) - 1)  # the autoencoder's factor, and the levels'
        if self.frames < 2 or self.size % side:
            raise ValueError(f"CMMD frames {self.frames} must be 2 or more, size {self.size} a multiple of {side}")
        check_mel(self)
        if any(c < 1 or c % self.groups or c % (2 * self.heads) for c in self.video_channels + self.audio_channels):
            raise ValueError(f"CMMD channels must be multiples of groups {self.groups} and twice heads {self.heads}")
        if self.fusion not in ("learned", "mean", "attention", "none"):
            raise ValueError(f"CMMD fusion is {self.fusion!r}, expected 'learned', 'mean', 'attention' or 'none'")


SIZES = {  # "demo" is the config's own, 10 M parameters; "base" has 121 M, for one GPU of 24 GB or more
    "demo": {}, "base": dict(video_channels=(192, 320, 480), audio_channels=(320, 512, 704)),
}


def check_fields(config):
    """Make tuples of a config's lists, as JSON has them; ValueError for what is of another kind than its field."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, value := tuple(value))
        kinds, item, expected = {
            int: (Integral, Integral, "a whole number"), float: (Real, Real, "a finite number"),
            tuple: (tuple, Integral, "a list of whole numbers"), str: (str, str, "text"),
        }.get(field.type, ((Real, tuple), Real, "a finite number or a list of them"))
        values = value if isinstance(value, tuple) else (value,)
        right = isinstance(value, kinds) and not isinstance(value, bool) and all(isinstance(x, item) for x in values)
        if not right or item is not str and not all(abs(x) <= 1e9 for x in values):
            raise ValueError(f"{type(config).__name__}: {field.name} is {value!r:.60}, expected {expected}")


def check_mel(config):
    """Raise ValueError for mel settings, of a CMMDConfig or a VocoderConfig, that do not fit together."""
    name, c = type(config).__name__, config
    if c.n_fft < c.hop:
        raise ValueError(f"{name}: n_fft {c.n_fft} is shorter than hop {c.hop}: samples are skipped")
    if not 0 <= c.f_min < c.f_max <= c.sample_rate / 2:
        raise ValueError(f"{name}: f_min {c.f_min} and f_max {c.f_max} must satisfy 0 <= f_min < f_max <= "
                         f"{c.sample_rate / 2:g} (half the sample rate)")


def mel_frames(T, config):
    """Mel frames that T video frames reach into: ceil(T * sample_rate / (fps * hop)), 113 for 18 frames at 10 fps."""
    return math.ceil(T * config.sample_rate / (config.fps * config.hop) - 1e-6)


def whole_mel_frames(T, config):
    """Mel frames that end within T video frames, and at least one: 112 for 18 frames at 10 fps, the paper's pairing."""
    return max(1, math.floor(T * config.sample_rate / (config.fps * config.hop) + 1e-6))


class TimeEmbedding(nn.Module):
    """t_video, t_audio (B,) -> (B, E): sinusoids of both, one after the other, through one MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t_video, t_audio):
        rates = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=t_video.device))
        angles = torch.stack([t_video, t_audio], dim=1).float()[..., None] * rates  # (B, 2, 32)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1))


class Attention(nn.Module):
    """Self-attention over time with rotary positions, residual: x (N, S, C) -> the same. Any S."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = zeroed(nn.Linear(c, c))

    def forward(self, x):
        q, k, v = turned_heads(self.qkv(self.norm(x)), self.heads, torch.arange(x.shape[1], device=x.device))
        return x + self.out(attend(q, k, v))


def turned_heads(x, heads, positions):
    """x (N, S, 3C) -> queries, keys, turned by rotary `positions` (S,) (RoFormer), values: (N, heads, S, C/heads)."""
    q, k, v = x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    half = v.shape[-1] // 2
    angles = positions[:, None] * 1000.0 ** (-torch.arange(half, device=positions.device) / half)  # (S, C/heads/2)
    cos, sin = angles.cos(), angles.sin()

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    return turn(q), turn(k), v


def attend(q, k, v):
    """Queries (N, heads, S, d), keys and values (N, heads, R, d) -> (N, S, heads*d)."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    h = scores.softmax(dim=-1).to(v.dtype) @ v  # torch's fused one is 10 times slower in bf16 backward on a CPU
    return h.transpose(1, 2).flatten(2)


def zeroed(module):
    """module with its weights and bias set to 0, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """norm-SiLU-conv, norm, scale and shift by the noise level, SiLU-conv; residual.

    Frames (B*T, C, H, W) if dims is 2, sound (B, C, L) if 1."""

    def __init__(self, c_in, c_out, embedding, groups, dims):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), conv(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), zeroed(conv(c_out, c_out, 3, padding=1))
        self.time = nn.Linear(embedding, 2 * c_out)
        self.skip = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        change = self.time(time).repeat_interleave(len(x) // len(time), dim=0)  # (B, 2C) -> (B*T, 2C)
        scale, shift = change.reshape(change.shape + (1,) * (x.dim() - 2)).chunk(2, dim=1)
        return self.skip(x) + self.conv2(F.silu(h * (1 + scale) + shift))


class VideoBlock(nn.Module):
    """Within frames a ResidualBlock; across frames a convolution of width 3 and, where asked, attention."""

    def __init__(self, c_in, c_out, embedding, config, attention):
        super().__init__()
        self.space = ResidualBlock(c_in, c_out, embedding, config.groups, dims=2)
        self.norm = nn.GroupNorm(config.groups, c_out)
        self.conv = zeroed(nn.Conv2d(c_out, c_out, (3, 1), padding=(1, 0)))
        self.attention = Attention(c_out, config.heads) if attention else None

    def forward(self, x, time):
        x = self.space(x, time)
        B, H, W = len(time), *x.shape[2:]
        h = F.silu(self.norm(x)).unflatten(0, (B, -1)).flatten(3).transpose(1, 2)  # (B*T, C, H, W) -> (B, C, T, H*W)
        x = x + self.conv(h).transpose(1, 2).reshape(x.shape)  # (B, C, T, H*W) -> (B*T, C, H, W)
        if self.attention is None:
            return x
        h = x.unflatten(0, (B, -1)).permute(0, 3, 4, 1, 2)  # (B*T, C, H, W) -> (B, H, W, T, C)
        h = self.attention(h.flatten(0, 2)).unflatten(0, (B, H, W))  # over T
        return h.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B, H, W, T, C) -> (B*T, C, H, W)


class AudioBlock(nn.Module):
    """The same in one dimension: a ResidualBlock over L and, where asked, attention."""

    def __init__(self, c_in, c_out, embedding, config, attention):
        super().__init__()
        self.time = ResidualBlock(c_in, c_out, embedding, config.groups, dims=1)  # over time, L
        self.attention = Attention(c_out, config.heads) if attention else None

    def forward(self, x, time):
        x = self.time(x, time)
        if self.attention is None:
            return x
        return self.attention(x.transpose(1, 2)).transpose(1, 2)  # over L


def interpolation(T, L, step, fps, device=None):
    """(L, T): row j mixes the video frames nearest to mel frame j, by true time: frame k is at (k + 1/2)/fps seconds,
    mel frame j at (j + 1/2) * step. Rows sum to 1."""
    position = ((torch.arange(L, device=device) + 0.5) * step * fps - 0.5).clamp(0, T - 1)
    return (1 - (position[:, None] - torch.arange(T, device=device)).abs()).clamp(min=0)


def averaging(T, L, step, fps, device=None):
    """(2, T, L): row k of the first averages the mel frames that sound while video frame k is shown; the second weighs
    them by when they sound, from -1 at its start to 1 at its end, so that a frame knows when within it a touch is."""
    frame, mel = torch.arange(T, device=device)[:, None] / fps, torch.arange(L, device=device)[None] * step
    overlap = (torch.minimum(frame + 1 / fps, mel + step) - torch.maximum(frame, mel)).clamp(min=0)  # (T, L) seconds
    overlap = overlap / overlap.sum(dim=1, keepdim=True).clamp(min=1e-6)
    within = ((mel + step / 2 - frame) * fps * 2 - 1).clamp(-1, 1)
    return torch.stack([overlap, overlap * within])


def phase(L, step, fps, device=None):
    """(2, L): cosine and sine of where within a video frame each mel frame lies."""
    angle = 2 * math.pi * (torch.arange(L, device=device) + 0.5) * step * fps
    return torch.stack([angle.cos(), angle.sin()])


def moving(x):
    """x (B, T, C) -> what changes in it: each channel less its mean over T, scaled to unit variance."""
    x = x - x.mean(dim=1, keepdim=True)
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-3).rsqrt()


class EasyFusion(nn.Module):
    """Easy fusion (Fig. 1; defined here, the paper's appendix being out of reach): each modality's features, brought to
    the other's times and projected, are added to the other's. Cost O((T*H*W + L*T)*C), no attention between the two.

    Video to audio: per head, a 1x1 convolution scores the positions of a frame and a softmax over H*W weighs them (a
    ball fills 2 % of the picture and drowns in a plain mean). What crosses: `found`, the features averaged by it, and
    `place`, the mean position, both as they are (`found` normalised) and both less their mean over T at unit variance
    (`moving`), since a still background drowns a small ball over time too. Audio to video: added everywhere and, by a
    second projection, where a learned map over H*W of peak 1 says."""

    def __init__(self, video, audio, config):
        super().__init__()
        self.config, heads = config, config.heads
        self.norm_video, self.norm_audio = nn.GroupNorm(config.groups, video), nn.GroupNorm(config.groups, audio)
        self.score = nn.Conv2d(video, 2 * heads, 1) if config.fusion == "learned" else None
        self.norm_pooled = nn.LayerNorm(video)
        self.to_audio = nn.Conv1d(2 * (video + 2 * heads) + 2, audio, 1)
        self.to_video = nn.Linear(2 * audio, 2 * video)
        if self.score is not None:
            nn.init.normal_(self.score.weight, std=3 * video**-0.5)  # heads that look at something from the start

    def forward(self, video, audio, step):
        """video (B*T, Cv, H, W), audio (B, Ca, L), `step` seconds a mel frame at this level -> both, fused."""
        values = self.norm_video(video)
        look, write = self._maps(values)
        return video + self._to_video(audio, video, write, step), audio + self._to_audio(audio, values, look, step)

    def _maps(self, values):
        """values (N, C, H, W) -> maps (N, heads, H*W) to read by, a softmax, and to write by, of maximum 1."""
        N, _, H, W = values.shape
        if self.score is None:
            even = torch.ones(N, self.config.heads, H * W, device=values.device)
            return even / (H * W), even
        look, write = self.score(values).flatten(2).float().chunk(2, dim=1)
        return look.softmax(dim=2), (write - write.amax(dim=2, keepdim=True)).exp()

    def _to_audio(self, audio, values, look, step):
        """What is found where the heads look, where that is, how both move, and when within its frame (`phase`) each
        mel frame lies -> (B, Ca, L)."""
        B, L = len(audio), audio.shape[2]
        N, C, H, W = values.shape
        heads, fps, device = self.config.heads, self.config.fps, audio.device
        rows, columns = torch.linspace(-1, 1, H, device=device), torch.linspace(-1, 1, W, device=device)
        grid = torch.stack([rows.repeat_interleave(W), columns.repeat(H)], dim=1)  # (H*W, 2)
        with no_autocast(device):  # what moves by a little would drown in bf16
            found = torch.einsum("nhcp,nhp->nhc", values.float().reshape(N, heads, C // heads, H * W), look)
            found, place = (x.flatten(1).unflatten(0, (B, -1)) for x in (found, look @ grid))  # (B, T, C | 2*heads)
            crossing = torch.cat([self.norm_pooled(found), place, moving(torch.cat([found, place], dim=2))], dim=2)
            crossing = (interpolation(N // B, L, step, fps, device) @ crossing).transpose(1, 2)
        within = phase(L, step, fps, device).expand(B, 2, L)
        return self.to_audio(torch.cat([crossing, within], dim=1))

    def _to_video(self, audio, video, write, step):
        """What sounds while a frame is shown, and when within it, everywhere and where the map says -> as video."""
        B, L, (N, C, H, W), device = len(audio), audio.shape[2], video.shape, audio.device
        mix = averaging(N // B, L, step, self.config.fps, device)
        with no_autocast(device):
            seen = torch.einsum("stl,bcl->btsc", mix, self.norm_audio(audio.float()))  # (B, T, 2, Ca)
        everywhere, there = self.to_video(seen.flatten(2)).flatten(0, 1).chunk(2, dim=1)  # (N, Cv)
        there = there.reshape(N, self.config.heads, -1, 1) * write[:, :, None]  # (N, heads, Cv/heads, H*W)
        return everywhere[:, :, None, None] + there.reshape(N, C, H, W)


class AttentionFusion(nn.Module):
    """What easy fusion is measured against, at as many parameters: cross-attention. Each mel frame looks at all of
    the video's T*H*W places, each place at all mel frames; rotary positions tell true time. Cost O(L*T*H*W*C)."""

    def __init__(self, video, audio, config):
        super().__init__()
        self.config, heads = config, config.heads
        width = 2 * heads * max(1, round(1.6 * video * audio / (video + audio) / (2 * heads)))  # EasyFusion's count
        self.norm_video, self.norm_audio = nn.GroupNorm(config.groups, video), nn.GroupNorm(config.groups, audio)
        self.from_video, self.from_audio = nn.Linear(video, 3 * width), nn.Linear(audio, 3 * width)
        self.to_video, self.to_audio = nn.Linear(width, video), nn.Linear(width, audio)
        for layer in (self.from_video, self.from_audio):  # starts by looking at what is there at the same time
            nn.init.constant_(layer.bias[: 2 * width], 2.0)

    def forward(self, video, audio, step):
        """As EasyFusion's."""
        B, L, (N, C, H, W), device = len(audio), audio.shape[2], video.shape, audio.device
        places = self.norm_video(video).unflatten(0, (B, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, T*H*W, C)
        shown = (torch.arange(N // B, device=device) + 0.5).repeat_interleave(H * W)  # times in video frames
        heard = (torch.arange(L, device=device) + 0.5) * step * self.config.fps
        q_video, k_video, v_video = turned_heads(self.from_video(places), self.config.heads, shown)
        q_audio, k_audio, v_audio = turned_heads(
            self.from_audio(self.norm_audio(audio).transpose(1, 2)), self.config.heads, heard)
        seen = self.to_video(attend(q_video, k_audio, v_audio))
        found = self.to_audio(attend(q_audio, k_video, v_video)).transpose(1, 2)  # (B, L, Ca) -> (B, Ca, L)
        return video + seen.reshape(N, H, W, C).permute(0, 3, 1, 2), audio + found


class Pair(nn.Module):
    """A video block, an audio block, and the fusion after them. video, audio: channels (in, out) of each.

    forward: video (B*T, C, H, W), audio (B, C, L), time (B, E), `step` seconds a mel frame at this level -> both."""

    def __init__(self, video, audio, embedding, config, attention):
        super().__init__()
        self.video = VideoBlock(*video, embedding, config, attention)
        self.audio = AudioBlock(*audio, embedding, config, attention)
        fusion = AttentionFusion if config.fusion == "attention" else EasyFusion
        self.fusion = fusion(video[1], audio[1], config) if config.fusion != "none" else None

    def forward(self, video, audio, time, step):
        video, audio = self.video(video, time), self.audio(audio, time)
        return (video, audio) if self.fusion is None else self.fusion(video, audio, step)


class NoiseSkip(nn.Module):
    """A path around the U-Net for sound, x (B, M, L) -> the same: x and a local mix of it, each by a gain that the
    noise level sets. At low noise the velocity is almost the input's noise: 80 independent channels, which a U-Net of
    96 (`demo`) with nonlinearities reproduces badly."""

    def __init__(self, bins, embedding):
        super().__init__()
        self.mix = nn.Conv1d(bins, bins, 3, padding=1, bias=False)
        self.gains = zeroed(nn.Linear(embedding, 2 * bins))
        with torch.no_grad():  # starts as a blur over three bins and three frames
            near = (torch.arange(bins)[:, None] - torch.arange(bins)).abs() <= 1
            self.mix.weight.copy_(near[:, :, None].expand(-1, -1, 3) / 9.0)

    def forward(self, x, time):
        straight, blurred = self.gains(time)[:, :, None].chunk(2, dim=1)  # (B, M, 1)
        return straight * x + blurred * self.mix(x)


class StillSkip(nn.Module):
    """A path around the U-Net for video, x (B, T, C, H, W) -> the same: x and its mean over T, each by a gain that the
    noise level sets. Most of a picture stands still, and is denoised by averaging, which a U-Net only learns slowly."""

    def __init__(self, channels, embedding):
        super().__init__()
        self.gains = zeroed(nn.Linear(embedding, 2 * channels))

    def forward(self, x, time):
        straight, still = self.gains(time)[:, None, :, None, None].chunk(2, dim=2)  # (B, 1, C, 1, 1)
        return straight * x + still * x.mean(dim=1, keepdim=True)


class CMMD(nn.Module):
    """The joint model v_theta of Eq. 2 (Fig. 1): a video and an audio U-Net, level by level side by side.

    `CMMD(config)(video, audio, t_video, t_audio)`: noisy latents (B, T, C, H, W) and normalised mel (B, M, L) at their
    noise levels (B,) -> their velocities, of the same shapes. With t_video equal to t_audio it is the paper's model; a
    clean modality has t = 0 (ours). Any T and L; H and W must be multiples of 2^(levels - 1)."""

    Config = CMMDConfig

    def __init__(self, config=CMMDConfig()):
        super().__init__()
        self.config = config
        video, audio, levels, E = config.video_channels, config.audio_channels, len(config.video_channels), 256
        self.time = TimeEmbedding(E)
        self.video_in = nn.Conv2d(config.latent_channels, video[0], 3, padding=1)
        self.audio_in = nn.Conv1d(config.mel_bins, audio[0], 3, padding=1)
        pair = lambda v, a, level: Pair(v, a, E, config, config.attention[level])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(levels):
            v, a, last_v, last_a = video[i], audio[i], video[max(i - 1, 0)], audio[max(i - 1, 0)]
            self.down.append(nn.ModuleList(
                pair((v if j else last_v, v), (a if j else last_a, a), i) for j in range(config.blocks)))
        self.middle = pair((video[-1],) * 2, (audio[-1],) * 2, -1)
        for i in reversed(range(levels)):
            v, a, last_v, last_a = video[i], audio[i], video[min(i + 1, levels - 1)], audio[min(i + 1, levels - 1)]
            self.up.append(nn.ModuleList(
                pair((v + (v if j else last_v), v), (a + (a if j else last_a), a), i) for j in range(config.blocks)))
        self.video_down = nn.ModuleList(nn.Conv2d(c, c, 3, 2, 1) for c in video[:-1])
        self.audio_down = nn.ModuleList(nn.Conv1d(c, c, 3, 2, 1) for c in audio[:-1])
        last_video = zeroed(nn.Conv2d(video[0], config.latent_channels, 3, padding=1))
        last_audio = zeroed(nn.Conv1d(audio[0], config.mel_bins, 3, padding=1))
        self.video_out = nn.Sequential(nn.GroupNorm(config.groups, video[0]), nn.SiLU(), last_video)
        self.audio_out = nn.Sequential(nn.GroupNorm(config.groups, audio[0]), nn.SiLU(), last_audio)
        self.audio_skip, self.video_skip = NoiseSkip(config.mel_bins, E), StillSkip(config.latent_channels, E)
        self.to(memory_format=torch.channels_last)  # (B*T, H, W, C) in memory: conv over T needs no copy

    def forward(self, video, audio, t_video, t_audio):
        check_shapes(self.config, video, audio)
        B, L, depth = len(video), audio.shape[2], len(self.down) - 1
        step = self.config.hop / self.config.sample_rate  # seconds a mel frame
        time = self.time(t_video, t_audio)
        v = self.video_in(video.flatten(0, 1))  # (B, T, C, H, W) -> (B*T, C, H, W)
        a = self.audio_in(F.pad(audio, (0, -L % 2**depth), mode="replicate"))
        skips = []
        for i, level in enumerate(self.down):
            for pair in level:
                v, a = pair(v, a, time, step * 2**i)
                skips.append((v, a))
            if i < depth:
                v, a = self.video_down[i](v), self.audio_down[i](a)
        v, a = self.middle(v, a, time, step * 2**depth)
        for i, level in zip(reversed(range(depth + 1)), self.up):
            if i < depth:
                v, a = F.interpolate(v, scale_factor=2.0), F.interpolate(a, scale_factor=2.0)
            for pair in level:
                skip_v, skip_a = skips.pop()
                v, a = pair(torch.cat([v, skip_v], 1), torch.cat([a, skip_a], 1), time, step * 2**i)
        picture = self.video_out(v).unflatten(0, (B, -1)) + self.video_skip(video, time)
        return picture.float(), (self.audio_out(a)[..., :L] + self.audio_skip(audio, time)).float()


def check_shapes(config, video=None, audio=None):
    """Raise ValueError for latents or a mel, where given, that a CMMD of this config does not take."""
    C, M, side = config.latent_channels, config.mel_bins, 2 ** (len(config.attention) - 1)
    if video is not None and (video.dim() != 5 or video.shape[2] != C or any(n % side for n in video.shape[3:])):
        raise ValueError(f"CMMD got latents {tuple(video.shape)}, expected (B, T, {C}, H, W), H and W multiples of "
                         f"{side}")
    apart = video is not None and audio is not None and len(audio) != len(video)
    if audio is not None and (audio.dim() != 3 or audio.shape[1] != M or apart):
        raise ValueError(f"CMMD got a mel {tuple(audio.shape)}, expected (B, {M}, L), B as in the video")


# ---- Losses


SHARES = (0.2, 0.1, 0.5, 0.2)  # of a batch: both sides at one t, each at its own, clean video, clean audio


def draw_times(B, first_lesson=False, shares=SHARES, shift=1.0):
    """Noise levels for a batch -> t_video, t_audio (B,). Ours; the paper has one t for both.

    Four kinds of samples, in these `shares`, u being uniform in [0, 1):
      one t         1 - u^2 of the sound, `levels` with `shift` of the picture
      two t         1 - u^2 of each, drawn apart
      clean video   0 of the picture; of the sound 1 in a quarter of them, where sampling starts, else u
      clean audio   the other way round
    The first lesson of a training has the last two alone, the noisy side's t 1 in half of them, else uniform from 0.7:
    there only the clean side can lower the loss."""
    if first_lesson:
        side = torch.rand(B) * (shares[2] + shares[3]) < shares[2]
        t = (0.7 + 0.6 * torch.rand(B)).clamp(max=1.0)
        return torch.where(side, 0.0, t), torch.where(side, t, 0.0)
    bounds = torch.tensor(shares).cumsum(0) / sum(shares)
    kind = torch.bucketize(torch.rand(B), bounds[:-1], right=True)
    t_video, t_audio = 1 - torch.rand(2, B).square()
    pure = torch.rand(B) < 0.25
    alone = torch.where(pure, 1.0, torch.rand(B))
    t_video = torch.where(kind == 0, levels(t_audio, shift)[0], t_video)
    clean_video, clean_audio = kind == 2, kind == 3
    t_audio = torch.where(clean_video, alone, torch.where(clean_audio, 0.0, t_audio))
    t_video = torch.where(clean_audio, alone, torch.where(clean_video, 0.0, t_video))
    return t_video, t_audio


def motion_weights(video, share):
    """Latents (B, T, C, H, W) -> weights of the video's errors (B, T, 1, H, W) (ours): a `share` of the weight lies
    where a frame differs from the clip's mean. Their mean is 1, but 1 - share where nothing moves."""
    moved = (video - video.mean(dim=1, keepdim=True)).square().mean(dim=2, keepdim=True)
    return 1 - share + share * moved / moved.mean(dim=(1, 3, 4), keepdim=True).clamp(min=1e-6)


def joint_loss(model, video, audio, t_video, t_audio, noise_video, noise_audio, motion=0.0):
    """Eq. 2 of each sample and side -> (B, 2), video then audio. Either's squared error is averaged over its own
    elements, so that both weigh alike (ours; the paper has one norm over both).

    video (B, T, C, H, W), audio (B, M, L); times (B,); clean sides, t = 0, have loss 0. motion: `motion_weights`."""
    noisy = [diffuse(x, n, t) for x, n, t in ((video, noise_video, t_video), (audio, noise_audio, t_audio))]
    with fast_autocast(video.device):
        predicted = model(*noisy, t_video, t_audio)
    targets = velocity(video, noise_video, t_video), velocity(audio, noise_audio, t_audio)
    errors = [(p - v).square() for p, v in zip(predicted, targets)]
    if motion:
        errors[0] = errors[0] * motion_weights(video, motion)
    errors = [error.flatten(1).mean(dim=1) for error in errors]
    return torch.stack([errors[0] * (t_video > 0), errors[1] * (t_audio > 0)], dim=1)


class ContrastiveLoss(NamedTuple):
    """`total` to descend, and its parts, video then audio: Eq. 2 of the true pairs (B, 2), of pairs with a wrong sound
    (n, 2) and of pairs with a wrong picture (n, 2)."""

    total: torch.Tensor
    positive: torch.Tensor
    wrong_audio: torch.Tensor
    wrong_video: torch.Tensor


def contrastive_loss(model, pair, times, noise, negatives, eta, margin=None, motion=0.0):
    """Eq. 6: the true pairs' joint loss less eta times that of pairs with a wrong sound, less eta times that of pairs
    with a wrong picture -> ContrastiveLoss. All in one batched pass.

    pair, times, noise: (video, audio) each, as `joint_loss` takes them, and motion. negatives: (wrong_video,
    wrong_audio), each (n, ...): one of each (the paper's "sub-sample" of all M), for the first n samples of the batch
    alone (ours). A negative has its positive's times and noise, its velocity is that of the negative itself, and a
    clean side has no loss there either (ours; the paper is silent). Eq. 6 falls without bound as negatives get worse.
    With `margin` (ours) each term is a triplet loss instead, eta * max(0, margin + its positive's loss - its own): a
    negative that is worse by the margin is left alone, and where right and wrong cannot be told apart both pulls
    cancel, since the gradient flows through the positive in the hinge too: held constant there, eta = 1 diverged."""
    n = len(negatives[0])
    video = torch.cat([pair[0], pair[0][:n], negatives[0]])
    audio = torch.cat([pair[1], negatives[1], pair[1][:n]])
    more = [torch.cat([x, x[:n], x[:n]]) for x in (*times, *noise)]
    loss = joint_loss(model, video, audio, *more, motion)
    positive, wrong_audio, wrong_video = loss.split([len(pair[0]), n, n])
    total = positive.sum(dim=1).mean()
    for wrong in (wrong_audio, wrong_video) if n else ():
        wrong = wrong.sum(dim=1)
        if margin is None:
            total = total - eta * wrong.mean()
        else:
            total = total + eta * F.relu(margin + positive[:n].sum(dim=1) - wrong).mean()
    return ContrastiveLoss(total, positive, wrong_audio, wrong_video)


# ---- Negatives


def draw_negatives(x, shifted, others, dim, shares=(1, 1, 1)):
    """Sec. 2.2, "Creating Negative Samples": wrong partners for what belongs to x -> the same shape.

    x (n, ...): one modality's windows, time along `dim`; shifted: windows cut from the same clips some hundred
    milliseconds earlier or later (never rolled: a seam would give them away); others: windows of other clips. Shares of
    the kinds: shift; splice, a random left or right part taken from the other clip; swap, the other clip."""
    n, length = len(x), x.shape[dim]
    if not n:
        return x
    kind = torch.multinomial(torch.tensor(shares, dtype=torch.float32), n, replacement=True)
    split = torch.randint(1, max(length, 2), (n,))
    left = torch.rand(n) < 0.5
    foreign = (torch.arange(length) < split[:, None]) == left[:, None]  # (n, length): taken from the other clip
    foreign = (foreign & (kind == 1)[:, None]) | (kind == 2)[:, None]
    shape = [n] + [1] * (x.dim() - 1)
    is_shift = (kind == 0).reshape(shape).to(x.device)
    shape[dim] = length
    return torch.where(is_shift, shifted, torch.where(foreign.reshape(shape).to(x.device), others, x))


# ---- Sampler


CONDITIONS = ("clean", "replace", "guide")  # how a given side enters
TURNS = 2  # where neither side is given: how often picture and sound are made anew, each for the other
GUIDED = 0.5  # "clean" guides at noise levels above this: what is late are details, which guidance only roughens


def default_guidance(condition, given):
    """The guidance where none is asked for: 1 of "guide" (Eq. 3); 2 of "clean" for pictures of sounds, which otherwise
    follow them too little (measured: README); else 0."""
    return {"guide": 1.0, "clean": 2.0 if given == 1 else 0.0}.get(condition, 0.0)


@torch.no_grad()
def generate(model: CMMD, video: torch.Tensor | None = None, audio: torch.Tensor | None = None,
             frames: int | None = None, *, keep=(None, None), steps: int | None = None, condition: str = "clean",
             guidance: float | None = None, sampler: str = "ddim", stochasticity: float = 0.0, seeds=(0,),
             stride: int = 8, window_batch: int = 8, progress=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample what is missing: sound for `video`, video for `audio`, both for `frames` -> latents (B, T, C, H, W) and
    normalised mel (B, M, L), float32; what was given is returned as it is.

    video: latents (B, T, C, H, W) and audio: mel (B, M, L), as VAE.encode and CMMDConfig.normalise give them. frames: T
    where no whole video is given; by default as many as what is given fills.
    keep: (keep_video, keep_audio), for a side that is given in part: boolean masks (T,) or (B, T), (L,) or (B, L).
    Where True its values are held exactly, elsewhere and beyond its end they are made, in the same scene (`put_back`):
    continuation and inpainting.
    condition, how the given side enters: "clean" at its own t = 0 (ours), with classifier-free guidance of weight
    `guidance` (default: 2 for pictures, 0 for sounds) at t > 0.5, of what moves alone (`push_away`); "replace" noised
    to the current t (Eq. 5; at two levels where config.shift is not the paper's 1: `levels`), where guidance does
    nothing; "guide" also pulled down the gradient of its own reconstruction (Eq. 3) with lambda = guidance (default 1).
    Where no side is given whole, "replace" and "guide" make both at once, at one t, as the paper does; "clean" begins
    so, then makes picture and sound anew by turns, each for the other, from the same noise (ours). What is kept of a
    side stands, as in Eq. 5, at the noise level of what is made.
    steps: by default 3 for sounds and 8 for pictures, of each turn too, 10 for both before them; 10 by "replace" and
    "guide", 25 for both: see `sampling_times`.
    sampler: "ddim" with `stochasticity` s in [0, 1] (0 DDIM, 1 fresh noise at every step) or "dpm", DPM-Solver++(2M).
    seeds: one a sample; the same seed gives the same noise on any device and in any batch. Clips longer than a training
    window are cut into windows every `stride` frames or so (at whole mel frames), `window_batch` at a time, whose
    predictions are blended at every step, and whose noise is `of_one_scene`. progress(done, steps) is called after each
    step. ValueError for arguments that do not fit together."""
    check_sampling(steps, condition, guidance, stochasticity, sampler)
    config, device = model.config, next(model.parameters()).device
    if condition == "guide" and config.fusion == "none":
        raise ValueError("condition 'guide' needs a model with fusion: without it neither side sees the other")
    given = _given_whole((video, audio), keep, config)
    known = [x if x is None else x.to(device).float() for x in (video, audio)]
    T = _frames_that_fill(known, given, frames, config)
    fits = len(seeds) and all(len(seeds) == len(x) for x in known if x is not None)
    if not isinstance(T, Integral) or min(T, stride, window_batch) < 1 or not fits:
        raise ValueError("generate needs at least one frame, a stride and a window_batch of at least 1 and one seed a "
                         f"sample; got {T} frames, {stride}, {window_batch} and {len(seeds)} seeds")
    windows = Windows(T, config, stride, window_batch)
    settings = _Settings(seeds, condition, guidance, sampler, stochasticity)
    reach = windows.sizes[0], 0 if given == 0 else windows.sizes[1]  # a whole picture tells the sound
    kept = [(i, known[i], keep[i].to(device), reach[i]) for i in (0, 1) if keep[i] is not None]
    sides = [given]  # for which, one after the other, the other side is made; None: both
    if given is None and condition == "clean":
        sides += [1, 0] * TURNS
    times = [sampling_times(steps, side, condition) for side in sides]
    total, done, made = sum(len(t) - 1 for t in times), count(1), list(known)
    tell = progress and (lambda *_: progress(next(done), total))
    for side, t in zip(sides, times):  # `side`: given whole, or as the turn before made it; the other is made (anew)
        known_now, made = [made[i] if i == side else x for i, x in enumerate(known)], None  # frees the turn before
        kept_now = [part for part in kept if part[0] != side]
        made = _make(model, windows, settings, known_now, kept_now, side, t, tell)
    return tuple(made)


def _frames_that_fill(known, given, frames, config):
    """The clip's frames: those of a whole video, else those asked for, else as many as what is given fills."""
    if frames is not None and given != 0:
        return frames
    seen, L = 0 if known[0] is None else known[0].shape[1], 0 if known[1] is None else known[1].shape[2]
    heard = math.floor((L - 1) * config.hop * config.fps / config.sample_rate + 1e-6) + 1  # that the mel reaches into
    return seen if given == 0 else max(seen, heard)


class _Settings(NamedTuple):
    """Those arguments of `generate` that all of its turns share."""

    seeds: tuple
    condition: str
    guidance: float | None
    sampler: str
    stochasticity: float


def _make(model, windows, settings, known, kept, given, times, progress):
    """Make the side that is not `given`, or both if it is None, down the noise levels `times` -> [video, audio]."""
    config, device, clean = model.config, next(model.parameters()).device, settings.condition == "clean"
    H, W = [config.size // 8] * 2 if known[0] is None else known[0].shape[3:]
    L = known[1].shape[2] if given == 1 else mel_frames(windows.frames, config)
    shapes = (windows.T, config.latent_channels, H, W), (config.mel_bins, windows.L)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in settings.seeds]

    def draw(side):
        x = torch.empty(len(generators), *shapes[side])
        for one, generator in zip(x, generators):
            one.normal_(generator=generator)
        return of_one_scene(x, windows.sizes[side], 1 + side).to(device)

    noise, guidance = [draw(0), draw(1)], settings.guidance
    guidance = default_guidance(settings.condition, given) if guidance is None else guidance
    if given is not None and clean and not guidance:
        noise[given] = None  # drawn so that the generators go on alike, then never seen
    shift = 1 if clean and given is not None else config.shift  # only one side is noisy there
    whole = None if given is None else known[given]
    predict = _predictor(model, windows, whole, given, settings.condition, guidance, shift)
    x = integrate(lambda *a: put_back(predict(*a), kept), noise, given, times, settings.sampler,
                  settings.stochasticity, draw, progress, shift)
    if given is not None:
        x[given] = whole
    if L > x[1].shape[2]:  # a last mel frame only begins within the video: the one before again
        x[1] = F.pad(x[1], (0, L - x[1].shape[2]), mode="replicate")
    video, audio = put_back(x, [(*part[:3], 0) for part in kept])  # no correction: no step follows
    return [video[:, : windows.frames], audio[:, :, :L]]


def of_one_scene(noise, n, dim):
    """White noise (B, ...) over several windows of n along the dimension `dim`: replace, in place, its running mean
    over n by the mean of the first n. What stands still in a window (a wall, a timbre) follows that mean, so that a
    long clip keeps its scene. The means of other windows come near to the first's, not to equal it; the variance stays
    about 1 (ours; FreeNoise, arXiv 2310.15169, shuffles noise to this end)."""
    places = torch.arange(noise.shape[dim])
    for sample in noise.movedim(dim, -1):
        for part in sample:  # a channel or bin after the other, so that it takes the memory of one alone
            running = running_mean(part, places, n, -1, places)
            part += running[..., :1] - running
    return noise


def running_mean(x, places, n, dim, at):
    """x (..., K, ...) stands at `places` (K,), ascending, along `dim` -> its means over the n of them (or all, where
    there are fewer) that are nearest to each of the places `at`."""
    n = min(n, len(places))
    starts = torch.searchsorted(places[:-n] + places[n:], 2 * at)  # the next n are nearer from halfway to the next one
    return x.unfold(dim, n, 1).mean(-1).index_select(dim, starts)


def put_back(x, kept):
    """Overwrite x = [video, audio] with what is kept of a side, [(side, values, mask (n,) or (B, n), reach)]; the rest
    of that side is corrected by the mean error of the `reach` kept frames nearest to each place (0: not at all).

    Called on every prediction x_0, and, without a reach, on the result. Where x_0 is the truth, a step computes the
    noise that x_t holds and mixes it with the truth again at the next level: the kept stretch is diffuse(truth,
    noise, t), as in Eq. 5, with its first noise if none is drawn anew. That alone tells the rest too little, since it
    is decided at high noise: the correction (ours), which ends as x_t comes to show what is kept, lets what stands
    still (a wall, a timbre) go on. Not so a sound whose picture is given whole: the picture tells what is heard, and
    silence that is kept would go on."""
    for side, values, mask, reach in kept:
        mask = mask[..., : x[side].shape[1 + side]]
        for one, known, own in zip(x[side], values, mask.expand(len(x[side]), -1)):
            places = own.nonzero()[:, 0]
            if len(places):
                known = known.index_select(side, places)
                if reach:
                    error, at = known - one.index_select(side, places), torch.arange(one.shape[side], device=one.device)
                    one += running_mean(error, places, reach, side, at)
                one.index_copy_(side, places, known)
    return x


def _given_whole(known, keep, config):
    """Which side is given whole: 0 video, 1 audio or None. ValueError: nothing is left, or shapes do not fit."""
    whole = [side for side in (0, 1) if known[side] is not None and keep[side] is None]
    if len(whole) == 2:
        raise ValueError("generate was given both video and audio: nothing is left to make; `keep` masks what stays")
    check_shapes(config, *known)
    for name, x, mask, dim in zip(("video", "audio"), known, keep, (1, 2)):
        fits = mask is None or x is not None and mask.dtype == torch.bool and mask.shape in (
            x.shape[dim : dim + 1], (len(x), x.shape[dim]))
        if not fits:
            got = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"generate got a mask {got} to keep of the {name}, expected a boolean one as long as it"
                             + ("" if x is not None else ", but no such side was given"))
    return whole[0] if whole else None


def check_sampling(steps, condition, guidance=None, stochasticity=0.0, sampler="ddim"):
    """Raise ValueError for settings of `generate` that are out of range."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1):
        raise ValueError(f"steps is {steps!r}, expected a whole number of at least 1")
    if condition not in CONDITIONS:
        raise ValueError(f"condition is {condition!r}, expected one of {', '.join(CONDITIONS)}")
    if guidance is not None and not (isinstance(guidance, Real) and abs(guidance) <= 1e9):
        raise ValueError(f"guidance is {guidance!r}, expected a number from -1e9 to 1e9")
    if sampler not in ("ddim", "dpm"):
        raise ValueError(f"sampler is {sampler!r}, expected 'ddim' or 'dpm'")
    if not (isinstance(stochasticity, Real) and 0 <= stochasticity <= (sampler != "dpm")):
        raise ValueError(f"stochasticity is {stochasticity!r}: expected 0 to 1, and 0 with sampler 'dpm'")


def integrate(predict, noise, given, times, sampler="ddim", stochasticity=0.0, draw=None, progress=None, shift=1):
    """From pure noise down the noise levels `times`, from 1 to 0, -> [video, audio]. shift: see `levels`.

    predict(x, t, noise) -> [video, audio], the predicted clean data; what it sees of the side `given` is its own
    business: that side's x, noise and prediction may be None. The tensors `noise` are overwritten by what is made."""
    x, before, steps = list(noise), None, len(times) - 1
    for i in range(steps):
        x_0 = predict(x, times[i], noise)
        for side in {0, 1} - {given}:
            t_before, t, t_next = (levels(times[max(j, 0)], shift)[side] for j in (i - 1, i, i + 1))
            if sampler == "dpm":
                step = lambda x, x_0, last: dpm_step(x, x_0, last, t, t_next, t_before)
                in_pieces(step, x[side], x_0[side], before and before[side], into=x[side])
            else:
                step = lambda x, x_0, fresh: ddim_step(x, x_0, t, t_next, stochasticity, fresh)
                in_pieces(step, x[side], x_0[side], draw(side) if stochasticity else 0.0, into=x[side])
        before = x_0 if sampler == "dpm" else None
        if progress:
            progress(i + 1, steps)
    return x


def sampling_times(steps=None, given=None, condition="clean"):
    """Noise levels for `integrate`, from 1 down to 0, one more than steps (ours; measured: README).

    Sound of a clean video: equal steps, 3 unless told otherwise. Else 1 - (i / steps)^2, dense at high noise, where
    what happens when is decided (and where a training draws most times of pairs with two noisy sides): 8 for pictures
    of a clean sound, 10 by "replace" and "guide"; for both at once 25, or 10 where turns follow ("clean")."""
    if steps is None:
        clean, noised = {None: 10, 0: 3, 1: 8}, {None: 25, 0: 10, 1: 10}
        steps = (clean if condition == "clean" else noised)[given]
    power = 1 if given == 0 and condition == "clean" else 2
    return [1 - (i / steps) ** power for i in range(steps + 1)]


def in_pieces(function, *xs, into, size=2**18):
    """function(*xs), elementwise in those of xs that are tensors, all of one shape, written into the tensor `into`, one
    of them: `size` elements at a time, so that it takes no memory that grows with the clip."""
    pieces = [x.reshape(-1).split(size) if isinstance(x, torch.Tensor) else repeat(x) for x in xs]
    for out, *parts in zip(into.view(-1).split(size), *pieces):
        out.copy_(function(*parts))
    return into


def ddim_step(x_t, x_0, t, t_next, stochasticity=0.0, fresh=0.0):
    """x_t and x_0 of any one shape at t -> x at t_next, below t. Eq. 3, second line, as DDIM reads it: the noise is
    what x_0 leaves of x_t; a share s of it may be drawn anew.

    DDIM's eta (1: DDPM's noise) is s = eta sqrt((1 - a / a') / (1 - a)), a and a' being alpha_bar at t and t_next."""
    signal, sigma = scales(t, x_t)
    noise = (x_t - signal * x_0) / sigma
    return diffuse(x_0, math.sqrt(1 - stochasticity**2) * noise + stochasticity * fresh, t_next)


def dpm_step(x_t, x_0, x_0_before, t, t_next, t_before):
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2) from t, reached from t_before, to t_next; first order in the first two
    steps and the last, where the log signal-to-noise ratio is infinite at one end."""
    half_log_snr = lambda u: -math.log(math.tan(u * math.pi / 2))
    if x_0_before is not None and t_before < 1 - 1e-6 and t_next > 1e-6:
        h, h_before = half_log_snr(t_next) - half_log_snr(t), half_log_snr(t) - half_log_snr(t_before)
        x_0 = x_0 + (x_0 - x_0_before) * (h / h_before / 2)
    return ddim_step(x_t, x_0, t, t_next)


def _predictor(model, windows, known, given, condition, guidance, shift):
    """How the given side enters, as a function predict(x, t, noise) -> [video, audio] clean, for `integrate`. In its
    place the model sees: "clean": itself, at t = 0; "replace" and "guide": itself, noised to its level at t (`levels`);
    none given: what has been made of it so far, at its level."""

    def joint(x, t, noise):
        return windows.predictions(model, x, levels(t, shift))

    def clean(x, t, noise):
        x, times = list(x), [t, t]
        x[given], times[given] = known, 0.0
        return windows.predictions(model, x, times, given, noise[given], guidance if t > GUIDED else 0.0)

    def noised(x, t, noise):
        x, whole, times = list(x), windows.lengthen(known, given), levels(t, shift)
        x[given] = diffuse(whole, noise[given], times[given])
        if condition == "replace":
            return windows.predictions(model, x, times, given)
        x_0, gradient = windows.reconstruction_gradient(model, x, times, whole, given)  # "guide", Eq. 3
        signal = scales(times[1 - given], x_0)[0]  # sqrt(alpha_bar)
        pulled = x_0 - guidance * signal * gradient
        return [None, pulled] if given == 0 else [pulled, None]

    return joint if given is None else clean if condition == "clean" else noised


def push_away(x_0, blind, guidance, dim):
    """Classifier-free guidance (Ho and Salimans 2021) of what moves alone (ours): predictions x_0 (B, ...) + guidance
    times what they differ from the blind ones, less the mean of that over `dim`, time. What stands still in a picture
    no sound tells; pushed as well, it turns grey (measured: README)."""
    away = x_0 - blind
    return x_0 + guidance * (away - away.mean(dim, keepdim=True))


def clean_parts(model, parts, times):
    """The model's clean predictions [video, audio] for noisy parts (B, ...), all at the same two noise levels."""
    B, device = len(parts[0]), parts[0].device
    with fast_autocast(device):
        velocities = model(*parts, *(torch.full((B,), float(t), device=device) for t in times))
    return [denoise(x_t, v, t)[0] for x_t, v, t in zip(parts, velocities, times)]


class Windows:
    """Overlapping windows over a canvas of T video frames, the `frames` wanted and a few more if need be, and the mel
    frames that go with them.

    Windows are as long as those of the training, `config.frames` with the mel frames that end within them (18 and 112
    at 10 fps), and start on whole mel frames (at rates where none do, on the nearest ones). Predictions are joined with
    triangular weights. Memory is bounded by the batch of windows, and the result does not depend on it.
    side: 0 video, 1 audio; also the axis of time in one sample, (T, C, H, W) or (M, L)."""

    def __init__(self, frames, config, stride, batch):
        per_frame = config.sample_rate / (config.fps * config.hop)  # mel frames a video frame
        size, whole = min(frames, config.frames), lambda n: abs(n * per_frame - round(n * per_frame)) < 1e-6
        grid = next(filter(whole, range(1, config.frames)), None)
        if grid is None:  # mel starts are rounded: windows that only touch would leave gaps
            grid, stride = 1, min(stride, int((whole_mel_frames(size, config) - 1) / per_frame))
        stride = max(grid, min(stride, size) // grid * grid)
        self.frames, self.T = frames, size + -(-(frames - size) // grid) * grid
        self.L, self.batch, last = whole_mel_frames(self.T, config), batch, self.T - size
        starts, n = [*range(0, last, stride), last], whole_mel_frames(size, config)
        mel_starts = [min(round(s * per_frame), self.L - n) for s in starts[:-1]] + [self.L - n]
        self.sizes, self.starts = (size, n), (starts, mel_starts)
        self.weights = [self._blend_weights(side) for side in (0, 1)]

    def _blend_weights(self, side):
        """Per window, the share (n,) it has in the blend at each of its positions; shares sum to 1 everywhere."""
        n = self.sizes[side]
        ramp = torch.arange(n) + 0.5
        ramp = torch.minimum(ramp, n - ramp)
        total = torch.zeros((self.T, self.L)[side])
        for start in self.starts[side]:
            total[start : start + n] += ramp
        return [ramp / total[start : start + n] for start in self.starts[side]]

    def lengthen(self, x, side):
        """x, video (B, T, ...) or audio (B, M, L), cut or continued with its last frame to the canvas."""
        dim, length = (1, self.T) if side == 0 else (2, self.L)
        index = torch.arange(length, device=x.device).clamp(max=x.shape[dim] - 1)
        return x.index_select(dim, index)

    def batches(self, B):
        """All windows of B samples, as (sample, window) indices, `batch` at a time."""
        places = [(b, w) for w in range(len(self.starts[0])) for b in range(B)]
        return [places[i : i + self.batch] for i in range(0, len(places), self.batch)]

    def cut(self, x, side, places):
        """The windows `places` out of canvas x, stacked; one that ends before its last window goes on as it ended."""
        window, last = torch.arange(self.sizes[side], device=x.device), x.shape[1 + side] - 1
        where = lambda w: (self.starts[side][w] + window).clamp(max=last)  # index_select would copy all of a cut canvas
        return torch.stack([x[b][where(w)] if side == 0 else x[b][:, where(w)] for b, w in places])

    def paste(self, canvas, parts, side, places, weighted=True):
        """Add the windows `parts` onto the canvas, each times its share."""
        for part, (b, w) in zip(parts, places):
            start, n = self.starts[side][w], self.sizes[side]
            if weighted:
                share = self.weights[side][w].to(part)
                part = part * (share[:, None, None, None] if side == 0 else share)
            canvas[b].narrow(side, start, n).add_(part)

    def predictions(self, model, x, times, given=None, blind=None, guidance=0.0):
        """The clean data that the model predicts over the windows of x = [video, audio] at two noise levels, None of
        the side `given`. guidance: away from what it predicts where the noise `blind` takes that side's place."""
        out = [None if side == given else torch.zeros_like(x[side]) for side in (0, 1)]
        for places in self.batches(len(x[0])):
            parts = [self.cut(x[side], side, places) for side in (0, 1)]
            clean = clean_parts(model, parts, times)
            if guidance:
                made, parts[given] = 1 - given, self.cut(blind, given, places)
                unseeing = clean_parts(model, parts, [1.0 if side == given else t for side, t in enumerate(times)])
                clean[made] = push_away(clean[made], unseeing[made], guidance, 1 + made)
            for side in {0, 1} - {given}:
                self.paste(out[side], clean[side], side, places)
        return out

    def reconstruction_gradient(self, model, x, times, known, given):
        """Eq. 3: the other, noisy side predicted clean from x at two levels, and the gradient with respect to it of
        ||known - its prediction||^2, summed over elements, weighed by the windows' shares where they overlap."""
        made = 1 - given
        out, gradient = torch.zeros_like(x[made]), torch.zeros_like(x[made])
        for places in self.batches(len(x[0])):
            parts = [self.cut(x[side], side, places) for side in (0, 1)]
            with torch.enable_grad():
                parts[made].requires_grad_(True)
                x_0 = clean_parts(model, parts, times)
                shares = torch.stack([self.weights[given][w] for _, w in places]).to(x[0])
                shares = shares[:, :, None, None, None] if given == 0 else shares[:, None]
                error = (shares * (self.cut(known, given, places) - x_0[given]).square()).sum()
                (pull,) = torch.autograd.grad(error, parts[made])
            self.paste(out, x_0[made].detach(), made, places)
            self.paste(gradient, pull, made, places, weighted=False)
        return out, gradient


# ---- The rest: what serves all files


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path` to write to; rename it to `path` on success, remove it on failure.

    ValueError if the folder does not exist or cannot be written, or the disk is full."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: cannot write, the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise ValueError(f"{path}: cannot write, this is a folder; give a file name")
    temporary = path.with_name(f".{path.stem[:40]}-{os.urandom(4).hex()}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise ValueError(f"{path}: cannot write in {path.parent} ({error.strerror}); choose another folder") from None
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write module's weights, class name and config to one safetensors file; floating weights as `dtype` if given.

    ValueError if a weight is NaN or infinite, or would be in `dtype`."""
    weights = {name: w.detach().cpu().contiguous() for name, w in module.state_dict().items()}
    if dtype is not None:
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    check_plain(path, weights, f"{dtype} reaches to {torch.finfo(dtype).max:g}" if dtype else "nothing was written")
    write_tensors(path, weights, {"class": type(module).__name__, "config": json.dumps(asdict(module.config))})


def write_tensors(path, tensors, header):
    """Tensors by name and a header {text: text} as one safetensors file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(serialize(tensors, header))


def remove_unfinished(folder, pattern, age=0):
    """Remove what killed processes left of `atomic` in a folder, begun at least `age` s ago."""
    for left in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process was writing it, and has just renamed it
            if time.time() - left.stat().st_mtime >= age:
                left.unlink()


def load(path: str | os.PathLike, cls: type[nn.Module]) -> nn.Module:
    """Build cls(cls.Config) from a file that `save` wrote, load the weights strictly -> the module, float32, eval mode.

    ValueError, in one line, if the file is missing, is no safetensors file, holds another class, config or tensors, or
    a weight that is NaN or infinite."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
    except (OSError, SafetensorError, NotImplementedError) as error:
        reason = "there is no such file" if not os.path.exists(path) else f"not a whole safetensors file ({error})"
        raise ValueError(f"{path}: {reason}; expected the weights of a {cls.__name__}") from None
    if header.get("class") != cls.__name__:
        raise ValueError(f"{path}: holds {header.get('class', 'weights of unknown kind')}, expected a {cls.__name__}")
    try:
        module = cls(cls.Config(**json.loads(header["config"])))
    except Exception as error:  # whatever a damaged or foreign config provokes
        raise ValueError(f"{path}: its config makes no {cls.__name__} of this version ({first_line(error)})") from None
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: weights do not fit their own config: {str(error).splitlines()[1].strip()}") from None
    check_plain(path, weights)
    return module.eval()


def check_plain(path, tensors, hint="get another copy"):
    """Raise ValueError, in one line that ends in `hint`, if one of the tensors by name is no plain finite numbers."""
    for name, x in tensors.items():
        plain = x.is_floating_point() and x.layout == torch.strided and not x.is_meta
        if not plain or not x.float().isfinite().all():
            what = "holds NaN or infinity" if plain else f"is {x.dtype}, {x.layout}, on {x.device}"
            raise ValueError(f"{path}: {name} {what}, expected plain finite floating-point numbers; {hint}")


def read_tensors(path, kind, wanted=list):
    """Somebody's weights: the tensors of a file by name, or None if it is one that `save` wrote.

    It may be a safetensors file, or a pickle of nothing but tensors, also inside a training checkpoint; wanted(names)
    chooses among them. ValueError, in one line, for any other file; `kind` ("VAE") tells what was expected."""
    start, expected = None, f"expected the weights of a {kind}, .safetensors or a state dict"
    try:
        with open(path, "rb") as file:
            start = file.read(40)
        if start[8:9] == b"{":
            with safe_open(str(path), "pt") as file:
                ours = "class" in (file.metadata() or {})
                return None if ours else {name: file.get_tensor(name) for name in wanted(file.keys())}
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=_is_plain_zip(path))
    except Exception as error:  # whatever a damaged or foreign file provokes
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = ("there is no such file" if isinstance(error, FileNotFoundError)
                  else f"cannot be read ({getattr(error, 'strerror', error)})" if start is None
                  else "empty (0 bytes)" if not start
                  else "a Git LFS pointer, not the weights themselves" if start.startswith(b"version https://git-lfs")
                  else f"holds a {code[1]}, which could run code; get it as .safetensors" if code
                  else "a TorchScript program, not a state dict" if "TorchScript" in str(error)
                  else f"damaged, or of another kind ({type(error).__name__})")
        raise ValueError(f"{path}: {reason}; {expected}") from None
    tensors = _tensors_within(content)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; {expected}")
    return {name: tensors[name] for name in wanted(tensors)}


def _is_plain_zip(path):
    """Whether a file is a zip archive with nothing compressed, as torch.save writes it; only that may be mapped into
    memory. BadZipFile if it is one with a damaged part, which torch.load would take."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())


def _tensors_within(content):
    """The tensors by name of an unpickled state dict, or of one within a training checkpoint; {} if there are none."""
    content = content if isinstance(content, dict) else {}
    for key in ("state_dict", "generator", "model"):
        if isinstance(content.get(key), dict):
            return _tensors_within(content[key])
    return {str(name).removeprefix("module."): x for name, x in content.items() if isinstance(x, torch.Tensor)}


def first_line(error):
    """Of an error's message, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fit_tensors(path, tensors, names, module, kind, known):
    """Load somebody's tensors into `module` -> module, in evaluation mode. names: theirs -> ours.

    ValueError, in one line, if names or shapes differ or what they hold are no plain finite numbers; known: a piece of
    a name -> what a file with it looks like."""
    missing, extra = [n for n in names if n not in tensors], [n for n in tensors if n not in names]
    if missing or extra:
        looks = [text for piece, text in known.items() if any(piece in n for n in tensors)] or ["another network"]
        raise ValueError(f"{path}: not a {kind}'s state dict, it looks like {looks[0]}; "
                         f"missing: {first_few(missing)}; extra: {first_few(extra)}")
    check_plain(path, {name: tensors[name] for name in names})
    state = module.state_dict()
    for theirs, name in names.items():
        x, shape = tensors[theirs], tuple(state[name].shape)
        state[name] = x = x[..., 0, 0] if x.shape == (*shape, 1, 1) else x  # attention by 1x1 convolutions
        if x.shape != shape:
            raise ValueError(f"{path}: {theirs} is {tuple(x.shape)}, the other tensors imply {shape}")
    module.to_empty(device="cpu").load_state_dict(state)
    return module.eval()


def first_few(names):
    """Names for an error message: the first four, and how many there are if that is not all."""
    return (", ".join(names[:4]) or "none") + (f", ... ({len(names)} in all)" if len(names) > 4 else "")


REFUSED = (ValueError, ImportError, OSError, torch.cuda.OutOfMemoryError)  # told in one line


class Store(argparse.Action):
    """Keep a value. The lists of an option that is given more than once add up: no file is dropped without a word."""

    def __call__(self, parser, namespace, values, option=None):
        before = getattr(namespace, self.dest, self.default)
        more = self.nargs == "+" and before is not self.default
        setattr(namespace, self.dest, [*before, *values] if more else values)


class Parser(argparse.ArgumentParser):
    """A command line that refuses in one line, exit status 2; so do its subcommands."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register("action", None, Store)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help tells more)\n")

    def run(self, function, *arguments):
        """function(*arguments); the exit status: what it returns or 0, or 2 after one line that says what is wrong."""
        if hasattr(sys.stdout, "reconfigure"):  # no name of a file is refused by a terminal that cannot show it
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return function(*arguments) or 0
        except REFUSED as error:
            print(f"{self.prog}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def number(low=-1e9, high=1e9, kind=float):
    """A `type` for Parser.add_argument: a number of `kind` from low to high, the ends included, so never NaN."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is no number from {low:g} to {high:g}")
        return value

    read.__name__ = "number" if kind is float else "whole number"  # for what is none at all
    return read


def json_object(text):
    """A `type` for Parser.add_argument: a JSON object -> a dict."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError
    return content


SEED = number(0, 2**63 - 1, int)  # what a torch.Generator takes


def convert(program, read, options, argv=None):
    """The command line `python PROGRAM convert IN OUT.safetensors [--half]` -> exit status.

    read(IN, **settings) -> the module to save; options: setting -> its type and help, a --flag each."""
    parser = Parser(prog=program, description="Weights of others, for our own files.")
    command = parser.add_subparsers(required=True, metavar="convert").add_parser(
        "convert", help="published weights (or ours) -> our safetensors file")
    command.add_argument("source", metavar="IN", help="state dict or whole checkpoint: .safetensors .pt .bin .ckpt")
    command.add_argument("target", metavar="OUT.safetensors")
    command.add_argument("--half", action="store_true", help="write float16, half the size")
    for name, (kind, text) in options.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text)
    settings = vars(parser.parse_args(argv))
    source, target, half = (settings.pop(name) for name in ("source", "target", "half"))

    def work():
        if Path(target).suffix != ".safetensors":
            raise ValueError(f"{target}: the output's name must end in .safetensors")
        module = read(source, **settings)
        save(target, module, torch.float16 if half else None)
        print(f"{target}: {sum(x.numel() for x in module.parameters()) / 1e6:.1f} M parameters, {module.config}")

    return parser.run(work)


def torchrun_place():
    """(rank, number of processes, rank on this machine), as torchrun tells them; (0, 1, 0) without it."""
    return tuple(int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def usable_device(name=None):
    """torch.device of a name; by default a GPU if there is one. ValueError, in one line, where it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name}: cannot be used ({first_line(error)}); try cpu") from None
    return torch.device(name)


def fast_autocast(device):
    """Context: bf16 autocast where that is fast (GPUs from Ampere on, x86 CPUs with native bf16), else plain float32.

    CPUs that only emulate bf16 run a convolution 2.4 times slower in it than in float32, so the code asks."""
    kind = torch.device(device).type
    fast = kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # before Ampere bf16 is emulated
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.autocast(kind, torch.bfloat16) if fast else nullcontext()


def no_autocast(device):
    """Context: float32 stays float32, also within `fast_autocast`."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cuda", "cpu") else nullcontext()
