"""The tests, grouped by module, in the order of the files' own arrows: `pytest` runs all but the slow ones.

  cmmd        files, schedule, model, losses, sampler with oracles, windows, the gradient of Eq. 3
  vae         sizes, chunks, the quick start
  vocoder     stored outputs of the originals (melgan-neurips, librosa, HiFi-GAN), closed forms
  data        media made here with ffmpeg, and the real files of ../shared/data where they are; the world bounce
  sample      the user's door with small random networks: what goes in and out, not how it sounds
  train       exact resume, what the command line refuses
  evaluate    closed forms, the detector on the world's true sounds
  packaging   the wheel, beside a user's own sample.py
  weights     what ships in weights/: how well it does on held-out clips

Oracles wherever possible: closed forms, independent implementations, models that know the answer. None needs a network.
"""

import json
import math
import os
import struct
import subprocess
import sys
import venv
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cmmd
from cmmd import (
    CMMD, CMMDConfig, Windows, atomic, averaging, data, denoise, diffuse, draw_times, evaluate, generate, interpolation,
    joint_loss, mel_frames, sample as sampling, save, train, vae as vae_module, velocity, vocoder as vocoder_module)
from cmmd.data import KIND_PITCH, TRAINING_SEED, bounce
from cmmd.sample import Clip, load_models, sample
from cmmd.vae import VAE, VAEConfig, quick_start, vae_loss
from cmmd.vocoder import (
    Discriminator, DiscriminatorConfig, Vocoder, VocoderConfig, add_weight_norm, discriminator_loss, fold_weight_norm,
    generator_loss, griffin_lim, log_mel, mel_filters, mel_loss, multi_resolution_stft)

REPO = Path(cmmd.__file__).parent
SHARED = REPO.parent / "shared" / "data"  # real media, not part of the repository
WORLDS = REPO / "weights" / "worlds"
TINY = dict(video_channels=(8, 16), audio_channels=(16, 16), attention=(False, False), blocks=1, heads=2, groups=4)
TINY_VAE = VAEConfig(channels=(8, 8, 8, 8), blocks=1, groups=4)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small networks are no faster with more, and other processes then cannot make the tests crawl."""
    torch.set_num_threads(1)


@pytest.fixture
def full_precision(monkeypatch):
    """float32 throughout, also on processors where `fast_autocast` would choose bf16."""
    for module in (cmmd, vae_module, train):
        monkeypatch.setattr(module, "fast_autocast", lambda device: nullcontext())


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_line(error, path):
    """The message of a caught ValueError is one line that begins with the file."""
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path)) and len(message) > len(str(path)) + 20, message


# ==== cmmd: files


def tiny_model(**changes):
    """A small CMMD for 32 px whose every weight counts: nothing is left at zero."""
    torch.manual_seed(0)
    model = CMMD(CMMDConfig(**TINY | dict(size=32, attention=(False, True)) | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
    return model


def test_cmmd_atomic_writes_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with atomic(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt" and not path.exists()
        temporary.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(KeyError):
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyError
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "folder").mkdir()
    for wrong in (tmp_path / "none" / "a.txt", tmp_path / "folder"):
        with pytest.raises(ValueError) as error:
            with atomic(wrong):
                raise AssertionError("never reached")
        one_line(error, wrong)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_cmmd_save_and_load_round_trip(tmp_path):
    model, path = tiny_model(mel_mean=-2.5, fusion="mean"), tmp_path / "cmmd.safetensors"
    save(path, model)
    back = cmmd.load(str(path), CMMD)
    assert back.config == model.config and not back.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    save(path, model, dtype=torch.float16)
    half = cmmd.load(path, CMMD)
    for a, b in zip(model.state_dict().values(), half.state_dict().values(), strict=True):
        assert b.dtype == torch.float32 and torch.allclose(a, b, atol=1e-3)


def header_changed(path, **header):
    """Rewrite a file of weights with another header."""
    weights = cmmd.load(path, CMMD).state_dict()
    save_file({name: x.contiguous() for name, x in weights.items()}, path, metadata=header)


@pytest.mark.parametrize("spoil, says", [
    (lambda path: path.unlink(), "no such file"),
    (lambda path: (path.unlink(), path.mkdir()), "safetensors"),
    (lambda path: path.write_bytes(b"no weights at all"), "not a whole safetensors file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a whole safetensors file"),
    (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    (lambda path: save(path, VAE(TINY_VAE)), "holds VAE, expected a CMMD"),
    (lambda path: save_file({"x": torch.zeros(1)}, path), "unknown kind"),
    (lambda path: header_changed(path, **{"class": "CMMD"}), "config"),
    (lambda path: header_changed(path, **{"class": "CMMD", "config": "{"}), "config"),
    (lambda path: header_changed(path, **{"class": "CMMD", "config": '{"bands": 3}'}), "bands"),
    (lambda path: header_changed(path, **{"class": "CMMD", "config": '{"fusion": "strong"}'}), "'learned', 'mean' or"),
    (lambda path: header_changed(path, **{"class": "CMMD", "config": "{}"}), "weights do not fit"),
])
def test_cmmd_load_says_what_is_wrong(tmp_path, spoil, says):
    path = tmp_path / "cmmd.safetensors"
    save(path, tiny_model())
    spoil(path)
    with pytest.raises(ValueError, match=says) as error:
        cmmd.load(path, CMMD)
    one_line(error, path)


# ==== cmmd: schedule


def test_cmmd_schedule_inverse_pairs_and_ends():
    x, eps = noise(5, 3, 4, 2), noise(5, 3, 4, 2, seed=1)
    for t in (torch.tensor([0.0, 0.2, 0.5, 0.93, 1.0]), 0.0, 0.31, 1.0):
        back = denoise(diffuse(x, eps, t), velocity(x, eps, t), t)
        for got, wanted in zip(back, (x, eps)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert torch.equal(diffuse(x, eps, 0.0), x) and torch.equal(velocity(x, eps, 0.0), eps)
    torch.testing.assert_close(diffuse(x, eps, 1.0), eps, rtol=0, atol=1e-6)
    torch.testing.assert_close(velocity(x, eps, 1.0), -x, rtol=0, atol=1e-6)
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(cmmd.alpha_bar(t), 0.5 + 0.5 * torch.cos(math.pi * t), rtol=0, atol=1e-6)
    torch.testing.assert_close(diffuse(torch.ones(11, 1), torch.zeros(11, 1), t)[:, 0].square(), cmmd.alpha_bar(t))


# ==== cmmd: model


def test_cmmd_demo_sizes_are_the_designs():
    assert [mel_frames(T, CMMDConfig()) for T in (1, 4, 18, 36)] == [7, 25, 113, 225]
    parameters = sum(x.numel() for x in CMMD().parameters()) / 1e6
    assert 8 < parameters < 16


@pytest.mark.parametrize("changes", [
    dict(audio_channels=(16,)), dict(video_channels=(8, 18)), dict(heads=3), dict(fusion="strong"), dict(mel_std=0.0),
    dict(frames=0), dict(video_channels=(), audio_channels=(), attention=())])
def test_cmmd_config_refuses(changes):
    with pytest.raises(ValueError) as error:
        CMMDConfig(**TINY | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fusion", ["learned", "mean", "none"])
def test_cmmd_any_length_and_what_fusion_lets_through(full_precision, fusion):
    model, t = tiny_model(fusion=fusion), torch.tensor([0.5])
    for T, L in ((1, 7), (5, 31), (18, 113), (3, 1)):
        video, audio = noise(1, T, 4, 4, 4), noise(1, 80, L)
        with torch.no_grad():
            first, second = model(video, audio, t, t), model(video, audio + 0.3 * noise(1, 80, L, seed=1), t, t)
            third = model(video + 0.3 * noise(1, T, 4, 4, 4, seed=1), audio, t, t)
        assert first[0].shape == video.shape and first[1].shape == audio.shape
        assert first[0].std() > 0.01 and first[1].std() > 0.01
        assert torch.equal(first[0], second[0]) == (fusion == "none")  # the sound reaches the picture's velocity
        assert torch.equal(first[1], third[1]) == (fusion == "none")


@pytest.mark.parametrize("video, audio", [
    ((1, 5, 3, 4, 4), (1, 80, 31)), ((1, 5, 4, 3, 4), (1, 80, 31)), ((5, 4, 4, 4), (1, 80, 31)),
    ((1, 5, 4, 4, 4), (1, 79, 31)), ((1, 5, 4, 4, 4), (2, 80, 31)), ((1, 5, 4, 4, 4), (80, 31))])
def test_cmmd_refuses_other_shapes(video, audio):
    with pytest.raises(ValueError, match="got"):
        tiny_model()(torch.zeros(video), torch.zeros(audio), torch.zeros(1), torch.zeros(1))


def test_cmmd_normalise_and_back():
    model, mel = tiny_model(mel_mean=-3.0, mel_std=2.0), torch.tensor([-5.0, -3.0, 1.0])
    assert model.normalise(mel).tolist() == [-1.0, 0.0, 2.0]
    assert torch.equal(model.denormalise(model.normalise(mel)), mel)


def test_cmmd_interpolation_goes_by_true_time():
    T, L, step, fps = 18, 112, 0.016, 10  # s a mel frame, video frames a second
    mix = interpolation(T, L, step, fps)
    assert mix.shape == (L, T) and torch.allclose(mix.sum(1), torch.ones(L), atol=1e-5) and mix.min() >= 0
    shown = (torch.arange(T) + 0.5) / fps  # a video that shows its own time
    heard = (torch.arange(L) + 0.5) * step
    torch.testing.assert_close(mix @ shown, heard.clamp(0.05, 1.75), rtol=0, atol=1e-5)


def test_cmmd_averaging_goes_by_true_time():
    share, within = averaging(4, 20, 0.02, 10)  # five mel frames a video frame, exactly
    assert torch.allclose(share, torch.eye(4).repeat_interleave(5, 1) / 5, atol=1e-6)
    inner = torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8]) / 5
    assert torch.allclose(within, torch.eye(4).repeat_interleave(5, 1) * inner.repeat(4), atol=1e-5)
    share, within = averaging(18, 112, 0.016, 10)
    assert torch.allclose(share.sum(1), torch.ones(18), atol=1e-5)  # the last frame too, of which 92 ms are heard
    assert share[1, 6] == pytest.approx(0.12, abs=1e-5)  # mel frame 6 sounds from 96 to 112 ms, frame 1 from 100 ms on
    assert share[1].nonzero().flatten().tolist() == list(range(6, 13))
    assert within.abs().sum(1).max() <= 1
    angle = 2 * math.pi * 0.1 * (torch.arange(20) + 0.5) * 2
    assert torch.allclose(cmmd.phase(20, 0.02, 10), torch.stack([angle.cos(), angle.sin()]), atol=1e-5)


@pytest.mark.parametrize("changes", [dict(), dict(fusion="mean")])
def test_cmmd_bf16_is_close_to_float32(full_precision, changes):
    model, t = tiny_model(**changes), torch.tensor([0.3, 0.9])
    inputs = noise(2, 18, 4, 4, 4), noise(2, 80, 113), t, t.flip(0)
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(*inputs)
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.05 * a.norm()


# ==== cmmd: losses


class Oracle(nn.Module):
    """Returns the true velocity of known clean data: video (1, T or 1, C, H, W), audio (1, M, L or 1)."""

    def __init__(self, video, audio, **changes):
        super().__init__()
        self.config = CMMDConfig(**TINY | dict(size=32) | changes)
        self.truth, self.place, self.calls = (video, audio), nn.Parameter(torch.zeros(())), 0

    def forward(self, video, audio, t_video, t_audio):
        self.calls += 1
        out = []
        for x_t, x, t in zip((video, audio), self.truth, (t_video, t_audio)):
            angle = (t * math.pi / 2).reshape(-1, *[1] * (x_t.dim() - 1))
            out.append((angle.cos() * x_t - x) / angle.sin().clamp(min=1e-6))
        return out[0] + 0 * audio.sum(), out[1] + 0 * video.sum()  # each in the other's graph, as Eq. 3 asks


def test_cmmd_joint_loss_masks_clean_sides_and_is_the_plain_formula(full_precision):
    model, video, audio = tiny_model(), noise(3, 5, 4, 4, 4), noise(3, 80, 31)
    eps = noise(3, 5, 4, 4, 4, seed=1), noise(3, 80, 31, seed=2)
    times = torch.tensor([0.0, 0.5, 0.9]), torch.tensor([0.7, 0.0, 0.3])
    loss = joint_loss(model, video, audio, *times, *eps)
    assert loss.shape == (3, 2) and loss[0, 0] == 0 and loss[1, 1] == 0
    for i in range(3):
        noisy, target = [], []
        for x, e, t in zip((video[i], audio[i]), (eps[0][i], eps[1][i]), (times[0][i], times[1][i])):
            signal, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
            noisy.append((signal * x + sigma * e)[None])
            target.append(signal * e - sigma * x)
        for side, made in enumerate(model(*noisy, times[0][i, None], times[1][i, None])):
            wanted = ((made[0] - target[side]) ** 2).mean() if times[side][i] > 0 else torch.zeros(())
            torch.testing.assert_close(loss[i, side], wanted, rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
    oracle = Oracle(video[:1], audio[:1])
    assert joint_loss(oracle, video[:1], audio[:1], *(t[2:] for t in times), *(e[:1] for e in eps)).max() < 1e-8


def test_cmmd_draw_times_shares():
    torch.manual_seed(0)
    t_video, t_audio = draw_times(20_000)
    assert all(t.shape == (20_000,) and t.min() >= 0 and t.max() <= 1 for t in (t_video, t_audio))
    clean_video, clean_audio = t_video == 0, t_audio == 0
    same = t_video == t_audio
    assert not (clean_video & clean_audio).any()
    shares = [x.float().mean().item() for x in (same, clean_video, clean_audio, ~(same | clean_video | clean_audio))]
    assert shares == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.015)
    for pure in (t_audio[clean_video] == 1, t_video[clean_audio] == 1):
        assert pure.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert t_video[same].mean().item() == pytest.approx(2 / 3, abs=0.02)  # 1 - u^2


def test_cmmd_draw_times_of_the_first_lesson():
    torch.manual_seed(0)
    t_video, t_audio = draw_times(4000, first_lesson=True)
    clean_video = t_video == 0
    assert ((t_video == 0) ^ (t_audio == 0)).all()
    assert clean_video.float().mean().item() == pytest.approx(0.75, abs=0.04)
    noisy = torch.where(clean_video, t_audio, t_video)
    assert noisy.min() >= 0.7 and (noisy == 1).float().mean().item() == pytest.approx(0.5, abs=0.04)


# ==== cmmd: sampler


@pytest.mark.parametrize("frames", [5, 40])
@pytest.mark.parametrize("given", ["video", "audio", None])
@pytest.mark.parametrize("settings", [
    dict(), dict(sampler="dpm"), dict(stochasticity=0.5), dict(stochasticity=1.0, steps=1), dict(guidance=2.0),
    dict(condition="replace"), dict(condition="guide", guidance=0.5, sampler="dpm"),
])
def test_cmmd_oracle_makes_the_sampler_return_the_truth(frames, given, settings):
    """Windows of the long clip cannot know where they lie: its truth is constant over time."""
    windowed = frames > 18
    truth = [noise(1, 1 if windowed else frames, 4, 4, 4), noise(1, 80, 1 if windowed else 32)]
    model = Oracle(*truth)
    full = [truth[0].expand(2, frames, 4, 4, 4), truth[1].expand(2, 80, 250 if windowed else 32)]
    known = {given: full[0 if given == "video" else 1]} if given else {}
    seen = []
    made = generate(model, **known, frames=frames, seeds=(3, 4), **{"steps": 4} | settings,
                    progress=lambda *a: seen.append(a))
    steps = settings.get("steps", 4)
    assert seen == [(i + 1, steps) for i in range(steps)]
    for name, got, wanted in zip(("video", "audio"), made, full):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=0 if name == given else 1e-4)


def gaussian_error(sampler, steps, deviation=0.3):
    """How far the sampler ends from the exact solution for data N(0, deviation^2), which is noise * deviation."""
    start = [noise(400), noise(400, seed=1)]

    def predict(x, t, _):
        signal, sigma = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        return [signal * deviation**2 / (signal**2 * deviation**2 + sigma**2) * side for side in x]

    made = cmmd.integrate(predict, start, None, steps, sampler)
    return max(float((m - deviation * s).abs().mean()) for m, s in zip(made, start))


def test_cmmd_samplers_converge_to_the_exact_solution():
    ddim, dpm = ([gaussian_error(sampler, steps) for steps in (10, 40, 160)] for sampler in ("ddim", "dpm"))
    assert ddim[0] > 3 * ddim[1] > 9 * ddim[2] and ddim[2] < 0.01  # first order
    assert all(a < 0.7 * b for a, b in zip(dpm, ddim)) and dpm[2] < 0.003


def test_cmmd_same_seed_gives_the_same_sample_in_any_batch(full_precision):
    model, video = tiny_model(), noise(2, 5, 4, 4, 4)
    together = generate(model, video, steps=2, stochasticity=0.5, seeds=(3, 5))[1]
    alone = generate(model, video[1:], steps=2, stochasticity=0.5, seeds=(5,))[1]
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1
    again = generate(model, video[1:], steps=2, stochasticity=0.5, seeds=(6,))[1]
    assert (again - alone).abs().max() > 0.1


@pytest.mark.parametrize("condition", ["clean", "guide"])
def test_cmmd_result_does_not_depend_on_the_batch_of_windows(full_precision, condition):
    model, video = tiny_model(frames=8), noise(2, 21, 4, 4, 4)
    settings = dict(steps=2, condition=condition, guidance=0.01, seeds=(1, 2))
    results = [generate(model, video, window_batch=n, **settings)[1] for n in (1, 3, 8)]
    assert results[0].shape == (2, 80, mel_frames(21, model.config))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-3)


def test_cmmd_generate_runs_in_the_fast_arithmetic(monkeypatch):
    monkeypatch.setattr(cmmd, "fast_autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    model, video = tiny_model(), noise(1, 5, 4, 4, 4)
    for condition in ("clean", "replace", "guide"):
        mel = generate(model, video, steps=2, condition=condition, guidance=0.01)[1]
        assert mel.dtype == torch.float32 and mel.isfinite().all()


def test_cmmd_generate_lengths():
    model = tiny_model()
    assert [x.shape for x in generate(model, frames=5, steps=1)] == [(1, 5, 4, 4, 4), (1, 80, 32)]
    made = generate(model, audio=noise(1, 80, 113), steps=1)  # 1.808 s: 18 whole frames
    assert [x.shape for x in made] == [(1, 18, 4, 4, 4), (1, 80, 113)]
    assert generate(model, audio=noise(1, 80, 2), steps=1)[0].shape == (1, 1, 4, 4, 4)


@pytest.mark.parametrize("arguments, says", [
    (dict(video=torch.zeros(1, 5, 4, 4, 4), audio=torch.zeros(1, 80, 32)), "both"), (dict(frames=5, steps=0), "steps"),
    (dict(frames=5, condition="hope"), "'hope'"), (dict(frames=5, sampler="euler"), "'euler'"), (dict(), "frame"),
    (dict(frames=5, stochasticity=1.5), "stochasticity"), (dict(frames=5, stochasticity=0.5, sampler="dpm"), "dpm"),
    (dict(video=torch.zeros(2, 5, 4, 4, 4)), "1 seeds"), (dict(frames=0), "0 frames"),
    (dict(frames=5, seeds=()), "0 seeds")])
def test_cmmd_generate_refuses(arguments, says):
    with pytest.raises(ValueError, match=says) as error:
        generate(tiny_model(), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("T", [1, 5, 18, 19, 20, 40, 101])
@pytest.mark.parametrize("changes, stride", [
    (dict(), 8), (dict(), 1), (dict(), 30), (dict(fps=12.5, hop=250), 6), (dict(fps=7), 5)])
def test_cmmd_windows_cover_the_canvas_and_share_it(T, changes, stride):
    config = CMMDConfig(**changes)
    windows = Windows(T, config, stride, 8)
    assert windows.T >= T and windows.L >= mel_frames(T, config)
    for side, length in enumerate((windows.T, windows.L)):
        total = torch.zeros(length)
        for (start, n), share in zip(windows.starts[side], windows.weights[side], strict=True):
            assert start >= 0 and start + n <= length and len(share) == n and share.min() > 0
            total[start : start + n] += share
        torch.testing.assert_close(total, torch.ones(length))
        assert len({n for _, n in windows.starts[side]}) == 1
    if config.fps == 10:  # windows start on whole mel frames
        assert all(abs(s * 6.25 - m) < 1e-9 for (s, _), (m, _) in zip(*windows.starts))


class Mixing(nn.Module):
    """A smooth model in which everything hangs on everything, in the arithmetic of its input."""

    def forward(self, video, audio, t_video, t_audio):
        seen = (video * torch.linspace(-1, 1, video.shape[1]).reshape(-1, 1, 1, 1)).mean((1, 2, 3, 4))
        heard = (audio * torch.linspace(1, 2, audio.shape[2])).mean((1, 2))
        return (torch.sin(2 * video + 9 * heard[:, None, None, None, None] + t_video[0]),
                torch.sin(3 * audio.roll(1, 2) + 9 * seen[:, None, None]) * audio)


def reconstruction_error(model, windows, x, t, known, given):
    """||known - its prediction||^2 over the windows, weighed by their shares, straight from the definition."""
    total, level = 0, torch.full((len(known),), t)
    for w, spans in enumerate(zip(*windows.starts)):
        (v, nv), (a, na) = spans
        cut = [x[0][:, v : v + nv], x[1][:, :, a : a + na]]
        true = known[:, v : v + nv] if given == 0 else known[:, :, a : a + na]
        x_0 = denoise(cut[given], model(*cut, level, level)[given], t)[0]
        share = windows.weights[given][w].to(true)
        share = share[:, None, None, None] if given == 0 else share
        total = total + (share * (true - x_0) ** 2).sum()
    return total


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("T", [5, 13])  # one window; several
@pytest.mark.parametrize("exact", [True, False])
def test_cmmd_gradient_of_eq_3_equals_finite_differences(full_precision, given, T, exact):
    model = Mixing() if exact else tiny_model(frames=6)
    kind, small, tolerance = (torch.float64, 1e-5, 1e-6) if exact else (torch.float32, 0.005, 0.03)
    windows = Windows(T, CMMDConfig(**TINY | dict(size=32, frames=6)), 4, 3)
    shapes = (2, windows.T, 4, 4, 4), (2, 80, windows.L)
    x = [noise(*shape, seed=i).to(kind) for i, shape in enumerate(shapes)]
    known = noise(*shapes[given], seed=2).to(kind)
    x_0, gradient = windows.reconstruction_gradient(model, x, 0.6, known, given)
    assert gradient.shape == shapes[1 - given] and not gradient.requires_grad and [p.shape for p in x_0] == list(shapes)
    for seed in (4, 5):
        step = noise(*gradient.shape, seed=seed).to(kind) + gradient / gradient.std()
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                moved = list(x)
                moved[1 - given] = x[1 - given] + sign * small * step / step.std() / gradient.numel() ** 0.5
                ends.append(reconstruction_error(model, windows, moved, 0.6, known, given))
        slope = (ends[0] - ends[1]) / (2 * small)
        wanted = (gradient * step).sum() / step.std() / gradient.numel() ** 0.5
        assert slope.item() == pytest.approx(wanted.item(), rel=tolerance)
    velocities = windows.velocities(model, x, [0.6, 0.6])
    for side in (0, 1):
        torch.testing.assert_close(x_0[side], denoise(x[side], velocities[side], 0.6)[0], rtol=0, atol=1e-4)


# ==== vae


def random_vae(config=TINY_VAE):
    torch.manual_seed(0)
    return VAE(config).eval()


@pytest.mark.parametrize("changes", [
    dict(channels=(8, 9)), dict(channels=()), dict(blocks=0), dict(scale=0.0), dict(latent_channels=0),
    dict(scale=(1.0, 1.0)), dict(shift=(0.0,) * 5), dict(scale=(1.0, 1.0, -1.0, 1.0))])
def test_vae_config_refuses(changes):
    with pytest.raises(ValueError, match="VAE"):
        replace(TINY_VAE, **changes)


def test_vae_published_sizes():
    assert VAEConfig().factor == 8 and TINY_VAE.factor == 8
    with torch.device("meta"):
        assert sum(x.numel() for x in VAE().parameters()) == 83_653_863  # of stabilityai/sd-vae-ft-mse


def test_vae_chunks_do_not_change_the_result(full_precision):
    vae, frames = random_vae(), noise(2, 5, 3, 32, 48).clamp(-1, 1)
    latents = vae.encode(frames)
    assert latents.shape == (2, 5, 4, 4, 6)
    back = vae.decode(latents)
    assert back.shape == frames.shape and back.abs().max() <= 1
    for chunk in (1, 3, 100):
        torch.testing.assert_close(vae.encode(frames, chunk=chunk), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(vae.decode(latents, chunk=chunk), back, rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.encode(frames[1:, 2:3]), latents[1:, 2:3], rtol=0, atol=1e-5)  # frame by frame


@pytest.mark.parametrize("scale, shift", [(0.5, 0.25), ((0.5, 1.0, 2.0, 3.0), (0.0, 0.1, 0.2, 0.3)), ((2.0,) * 4, 0.1)])
def test_vae_scale_and_shift_live_inside(full_precision, tmp_path, scale, shift):
    plain, frames = random_vae(replace(TINY_VAE, scale=1.0)), noise(1, 2, 3, 32, 32).clamp(-1, 1)
    save(tmp_path / "vae.safetensors", random_vae(replace(TINY_VAE, scale=scale, shift=shift)))
    scaled = cmmd.load(tmp_path / "vae.safetensors", VAE)
    assert (scaled.config.scale, scaled.config.shift) == (scale, shift)
    column = lambda x: torch.tensor(x).reshape(-1, 1, 1)
    latents = (plain.encode(frames) - column(shift)) * column(scale)
    torch.testing.assert_close(scaled.encode(frames), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.decode(latents), plain.decode(plain.encode(frames)), rtol=0, atol=1e-4)


def test_vae_draws_from_its_gaussian(full_precision):
    vae, frames = random_vae(), noise(1, 1, 3, 32, 32).clamp(-1, 1).expand(1, 400, 3, 32, 32)
    draws = [vae.encode(frames, sample=True, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    mean, log_variance = vae.moments(frames[0, :1])
    torch.testing.assert_close(draws[0].mean(1), mean * vae.config.scale, rtol=0, atol=0.05)
    torch.testing.assert_close(draws[0].std(1), torch.exp(log_variance / 2) * vae.config.scale, rtol=0.3, atol=0.0)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 2, 4, 32, 32), (1, 2, 3, 30, 32)])
def test_vae_encode_refuses(shape):
    with pytest.raises(ValueError, match="multiples of 8; got"):
        random_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (1, 2, 3, 4, 4)])
def test_vae_decode_refuses(shape):
    with pytest.raises(ValueError, match="got"):
        random_vae().decode(torch.zeros(shape))


@pytest.mark.parametrize("config", [TINY_VAE, train.SMALL_VAE])
def test_vae_quick_start_averages_and_blurs(config):
    torch.manual_seed(0)
    videos = [np.concatenate([bounce(seed, fps=2).video for seed in seeds]) for seeds in (range(4), range(4, 12))]
    frames, others = (train.to_frames(video)[None] for video in videos)
    vae = quick_start(VAE(config), others[0]).eval()
    latents, small = vae.encode(frames)[0, :, :3], torch.nn.functional.avg_pool2d(frames[0], 8)
    a, b = (x - x.mean((2, 3), keepdim=True) for x in (latents, small))  # the norms hide each frame's mean
    assert ((a * b).sum((2, 3)) / (a.norm(dim=(2, 3)) * b.norm(dim=(2, 3)))).min() > 0.95
    assert train.psnr(vae.decode(vae.encode(frames))[0] / 2, frames[0] / 2).mean() > 12


def test_vae_loss_is_lowest_for_the_truth(full_precision, monkeypatch):
    vae, frames = random_vae(), noise(2, 3, 32, 32).clamp(-1, 1)
    loss, out = vae_loss(vae, frames)
    assert out.shape == frames.shape
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in vae.parameters())
    monkeypatch.setattr(vae, "reconstruct", lambda z: frames)
    assert 0 <= vae_loss(vae, frames, kl_weight=0.0)[0] == 0 < loss


PUBLISHED_VAE = VAEConfig(channels=(32, 32, 64), blocks=1)


@cache
def published_vae():
    """Weights by name for AutoencoderKL of PUBLISHED_VAE's sizes, by diffusers' names of today."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in VAE(PUBLISHED_VAE).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        x = scattered(shape, name)
        norm = "norm" in name and name.endswith("weight")
        state[name] = x * (2 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 1 + 0.2 * x if norm else 0.1 * x
    return state


def compvis_names(levels, blocks):
    """Beginnings of names, CompVis' -> diffusers', as their two architectures have them."""
    names = {"quant_conv.": "quant_conv.", "post_quant_conv.": "post_quant_conv."}
    for side, way, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        for i in range(levels):
            ours, theirs = f"{side}.{way}_blocks.{i}.", f"{side}.{way}.{i if way == 'down' else levels - 1 - i}."
            names[f"{theirs}{way}sample."] = f"{ours}{way}samplers.0."
            for j in range(count):
                names[f"{theirs}block.{j}.nin_shortcut."] = f"{ours}resnets.{j}.conv_shortcut."
                names |= {f"{theirs}block.{j}.{part}.": f"{ours}resnets.{j}.{part}."
                          for part in ("norm1", "conv1", "norm2", "conv2")}
        for i, j in ((1, 0), (2, 1)):
            names[f"{side}.mid.block_{i}."] = f"{side}.mid_block.resnets.{j}."
        for a, b in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            names[f"{side}.mid.attn_1.{a}."] = f"{side}.mid_block.attentions.0.{b}."
        names |= {f"{side}.{a}.": f"{side}.{b}." for a, b in (
            ("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))}
    return names


def published_layout(layout):
    """published_vae's weights under the names and shapes of a layout."""
    state = dict(published_vae())
    if layout == "diffusers, old":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {name.replace(new, old): x for name, x in state.items()}
    elif layout.startswith("CompVis"):
        state = {theirs + name.removeprefix(ours): x[..., None, None] if "attn" in theirs and x.ndim == 2 else x
                 for theirs, ours in compvis_names(3, 1).items() for name, x in state.items() if name.startswith(ours)}
        assert len(state) == len(published_vae())
        state |= {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
        if layout == "CompVis, whole":
            state = {"first_stage_model." + name: x for name, x in state.items()}
            state |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(9),
                      "cond_stage_model.logit_scale": torch.ones(()), "model_ema.decay": torch.ones(())}
    return state


def write_weights(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 1} if path.suffix == ".ckpt" else state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".ckpt"])
@pytest.mark.parametrize("layout", ["diffusers, new", "diffusers, old", "CompVis", "CompVis, whole"])
def test_vae_load_equals_diffusers(tmp_path, layout, suffix):
    """Numbers stored from diffusers 0.42.1, AutoencoderKL; CompVis' own Encoder and Decoder agree with it to 1e-5."""
    vae = vae_module.load(write_weights(published_layout(layout), tmp_path / ("vae" + suffix)))
    assert vae.config == PUBLISHED_VAE and not vae.training
    with torch.no_grad():
        mean, log_variance = vae.moments(scattered((1, 3, 16, 16), "frames"))
        frames = vae.reconstruct(scattered((1, 4, 4, 4), "latents"))
    close([*mean[0, :, 1, 2], mean.abs().mean()], [-0.313639, 0.05686, -0.046405, -0.116409, 0.33364])
    close([*log_variance[0, :, 3, 0], log_variance.abs().mean()], [-0.328371, 0.224533, 0.166746, -0.5431, 0.39446])
    close([*frames[0, :, 5, 9], *frames[0, :, 0, 15], frames.abs().mean()],
          [-0.672292, 1.217876, -0.130598, -0.761634, 0.187908, 0.603316, 0.441953])


@pytest.mark.parametrize("config", [
    VAEConfig(channels=(8,), blocks=1, groups=8), VAEConfig(channels=(16, 48), blocks=3, latent_channels=3, groups=16),
    VAEConfig(channels=(32, 64, 64, 96), blocks=2, latent_channels=16), replace(TINY_VAE, scale=0.5, shift=0.1)])
def test_vae_load_reads_sizes_off_the_tensors(tmp_path, config):
    state = random_vae(config).state_dict()
    path, half = tmp_path / "vae.safetensors", tmp_path / "half.safetensors"
    save_file(state, path)
    save_file({name: x.half() for name, x in state.items()}, half)
    vae = vae_module.load(path, scale=config.scale, shift=config.shift, groups=config.groups)
    assert vae.config == config and all(torch.equal(x, state[name]) for name, x in vae.state_dict().items())
    vae_of_half = vae_module.load(half)
    assert vae_of_half.config == replace(config, scale=0.18215, shift=0.0, groups=math.gcd(32, *config.channels))
    assert next(vae_of_half.parameters()).dtype == torch.float32
    save(path, vae)
    assert vae_module.load(path).config == config


def test_vae_load_without_quant_convs_is_the_identity(tmp_path):
    state = {name: x for name, x in published_vae().items() if "quant_conv" not in name}
    vae = vae_module.load(write_weights(state, tmp_path / "vae.bin"), scale=0.3611, shift=0.1159)
    x = scattered((1, 3, 16, 16), "frames")
    with torch.no_grad():
        assert torch.equal(torch.cat(vae.moments(x), 1), vae.encoder(x))
        z = vae.moments(x)[0]
        assert torch.equal(vae.reconstruct(z), vae.decoder(z))



@pytest.mark.parametrize("layout, without, more, says", [
    ("diffusers, new", "decoder.conv_out.bias", {}, "changed Auto.*missing: decoder.conv_out.bias; extra: none"),
    ("diffusers, old", "encoder.mid_block.attentions.0.query.bias", {}, "missing: encoder.*query.bias; extra: none"),
    ("CompVis", "decoder.up.2.block.0.conv1.bias", {}, "missing: decoder.up.2.block.0.conv1.bias; extra: none"),
    ("CompVis, whole", "first_stage_model.quant_conv.bias", {}, "missing: first_stage_model.quant_conv.bias"),
    ("CompVis", None, {f"more.{i}": (1,) for i in range(9)}, r"extra: more.0, .*\(9 in all\)"),
    ("CompVis", None, {"encoder.down.1.attn.0.q.bias": (32,)}, "attention inside its levels"),
    ("CompVis", None, {"quantize.embedding.weight": (9, 4)}, "a VQ autoencoder"),
    ("diffusers, new", None, {"encoder.conv_in.bias": (7,)}, r"conv_in.bias is \(7,\).*imply \(32,\)"),
    ("diffusers, new", None, {"encoder.mid_block.attentions.0.to_q.weight": (64, 64, 3, 3)}, r"is \(64, 64, 3, 3\)"),
    ("diffusers, new", None, {"decoder.conv_in.weight": (64, 0, 3, 3)}, "latent_channels must be"),
    (None, None, {"model.1.weight_g": (64, 1, 1)}, "a MelGAN vocoder"),
    (None, None, {"time_embedding.linear_1.bias": (1,)}, "a diffusion U-Net"),
    (None, None, {"linear.weight": (1,)}, r"another network; missing: encoder.* in all\); extra: linear.weight"),
    (None, None, {}, "another network; missing: encoder.conv_in.weight"),
])
def test_vae_load_says_what_is_wrong(tmp_path, layout, without, more, says):
    state = published_layout(layout) if layout else {"step": 3}
    state |= {name: torch.zeros(shape) for name, shape in more.items()}
    state.pop(without, None)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt: .*" + says) as error:
        vae_module.load(tmp_path / "odd.pt")
    one_line(error, tmp_path / "odd.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".ckpt"])
def test_vae_load_refuses_other_files(tmp_path, suffix):
    path = tmp_path / ("vae" + suffix)
    whole = write_weights(published_vae(), path).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643276\n"
    cases = ((b"", "empty"), (pointer, "LFS pointer"), (b"<html>", "damaged"), (whole[:5000], "damaged"))
    for content, says in (*cases, (None, "no such file")):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(ValueError, match=says) as error:
            vae_module.load(path)
        one_line(error, path)


def test_vae_load_refuses_code_folders_and_vocoders(tmp_path):
    torch.save({"state_dict": published_vae(), "callback": Path("x")}, tmp_path / "code.ckpt")
    save(tmp_path / "vocoder.safetensors", Vocoder(VocoderConfig(base=2, residual_blocks=1)))
    save(tmp_path / "ours.safetensors", random_vae())
    torch.save([1], tmp_path / "list.pt")
    for name, says, given in (("code.ckpt", r"holds a pathlib.*as \.safetensors", {}), ("", "directory", {}),
                              ("vocoder.safetensors", "holds Vocoder", {}), ("list.pt", "another network", {}),
                              ("ours.safetensors", "carries its own settings, scale", {"scale": 1.0})):
        with pytest.raises(ValueError, match=says) as error:
            vae_module.load(tmp_path / name, **given)
        one_line(error, tmp_path / name)


def test_vae_convert(tmp_path, capsys):
    source, out = str(tmp_path / "sd.ckpt"), tmp_path / "vae.safetensors"
    write_weights(published_layout("CompVis, whole"), Path(source))
    assert vae_module.main(["convert", source, str(out), "--scale", "0.5", "--shift", "0.25"]) == 0
    assert "0.7 M parameters" in capsys.readouterr().out
    vae = cmmd.load(out, VAE)
    assert vae.config == replace(PUBLISHED_VAE, scale=0.5, shift=0.25)
    assert all(torch.equal(x, published_vae()[name]) for name, x in vae.state_dict().items())
    size = out.stat().st_size
    assert vae_module.main(["convert", str(out), str(out), "--half"]) == 0 and out.stat().st_size < 0.55 * size
    torch.testing.assert_close(vae_module.load(out).state_dict(), vae.state_dict(), rtol=1e-3, atol=1e-6)
    capsys.readouterr()
    for bad in ([str(tmp_path / "none.ckpt"), str(out)], [source, str(tmp_path / "vae.bin")],
                [source, str(tmp_path / "no" / "vae.safetensors")], [source, str(out), "--scale", "0"]):
        assert vae_module.main(["convert", *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_vae_convert_command_and_sample_takes_published_weights(tmp_path, weights):
    write_weights(random_vae().state_dict(), tmp_path / "sd.bin")
    command = [sys.executable, str(Path(vae_module.__file__)), "convert", "sd.bin", "vae.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "parameters, VAEConfig(channels=(8, 8, 8, 8)" in done.stdout, done.stderr
    for name in ("vocoder", "cmmd"):
        (tmp_path / f"{name}.safetensors").write_bytes((weights / f"{name}.safetensors").read_bytes())
    for state in (None, random_vae().state_dict()):  # converted, as published
        if state is not None:
            save_file(state, tmp_path / "vae.safetensors")
        assert load_models(tmp_path, "cpu").vae.config == replace(TINY_VAE, groups=8)


def test_vae_decodes_no_more_at_a_time_than_2_16_pixels(full_precision, monkeypatch):
    vae, seen = random_vae(TINY_VAE), []
    reconstruct, moments = vae.reconstruct, vae.moments
    monkeypatch.setattr(vae, "reconstruct", lambda z: seen.append(len(z)) or reconstruct(z))
    monkeypatch.setattr(vae, "moments", lambda x: seen.append(len(x)) or moments(x))
    frames = vae.decode(noise(1, 9, 4, 16, 16))  # 128 x 128
    vae.encode(frames)
    vae.decode(noise(2, 9, 4, 8, 8))  # 64 x 64
    assert seen == [4, 4, 1] * 2 + [16, 2] and frames.is_contiguous()


# ==== vocoder


MELGAN_MEL = VocoderConfig(sample_rate=22050, n_fft=1024, f_max=11025.0)  # descript's published front end
SMALL = VocoderConfig(base=4)


def scattered(shape, name):
    """Noise-like numbers in [-1, 1] that depend on the name only: sin(2 pi i^2 / 9973)."""
    i = torch.arange(math.prod(shape)) + zlib.crc32(name.encode()) % 9973
    return torch.sin(2 * math.pi / 9973 * (i * i % 9973).double()).float().reshape(shape)


def weight_normed(names_and_shapes, gain):
    """Weight-normed tensors by descript's names: {name: plain shape} -> {name_g, name_v or bias: tensor}."""
    state = {}
    for name, shape in names_and_shapes.items():
        if name.endswith("bias"):
            state[name] = 0.1 * scattered(shape, name)
        else:
            state[name + "_g"] = gain * (1.2 + 0.2 * scattered((shape[0], 1, 1), name + "_g"))
            state[name + "_v"] = scattered(shape, name + "_v")
    return state


def chirp(S):
    """A rising tone with a little noise, (1, S) at 16 kHz."""
    t = torch.arange(S).double() / 16000
    tone = 0.4 * torch.sin(2 * math.pi * (200 * t + 4000 * t * t))
    return (tone + 0.02 * scattered((S,), "noise").double()).float()[None]


def published_state():
    """A generator state dict as melgan-neurips numbers it (80 mels, ngf 4, 3 residual layers)."""
    shapes = {"model.1.weight": (64, 80, 7), "model.1.bias": (64,)}
    for i, (index, ratio, width) in enumerate(((3, 8, 32), (8, 8, 16), (13, 2, 8), (18, 2, 4))):
        shapes |= {f"model.{index}.weight": (2 * width, width, 2 * ratio), f"model.{index}.bias": (width,)}
        for j in range(index + 1, index + 4):
            for part, kernel in (("block.2", 3), ("block.4", 1), ("shortcut", 1)):
                shapes |= {f"model.{j}.{part}.weight": (width, width, kernel), f"model.{j}.{part}.bias": (width,)}
    return weight_normed(shapes | {"model.24.weight": (1, 4, 7), "model.24.bias": (1,)}, 0.95)


def close(values, expected, tolerance=1e-5):
    values, expected = torch.as_tensor(values).double(), torch.tensor(expected).double()
    torch.testing.assert_close(values, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("config, places, values, sums", [
    (VocoderConfig(), ((0, 1), (10, 13), (40, 56), (79, 253)), [0.02253456, 0.02441513, 0.00876148, 0.00105178],
     [0.0311723, 0.0321163, 0.0319305]),
    (MELGAN_MEL, ((0, 1), (10, 21), (40, 95), (79, 509)), [0.01276074, 0.0241469, 0.00892154, 0.00031545],
     [0.0463312, 0.0466432, 0.0464337]),
])
def test_vocoder_mel_filters_equal_librosas(config, places, values, sums):
    filters = mel_filters(config)
    assert filters.shape == (80, config.n_fft // 2 + 1)
    close([filters[i, j] for i, j in places], values, 1e-7)
    close(filters[[0, 40, 79]].sum(1), sums, 1e-6)


@pytest.mark.parametrize("config, values, mean", [
    (VocoderConfig(), [-0.780669, -1.097122, -0.033966, -3.167448, -5.0, -3.805355], 3.8831408),
    (MELGAN_MEL, [-0.383249, -1.546392, -1.129893, -1.219569, -5.0, -2.978787], 3.4298537),
])
def test_vocoder_log_mel_equals_audio2mel(config, values, mean):
    mel = log_mel(chirp(8000), config)
    assert mel.shape == (1, 80, 31)
    close(mel.flatten()[[0, 500, 1000, 1500, 2000, -1]], values)
    close(mel.abs().mean(), mean)


def test_vocoder_log_mel_times_levels_and_shapes():
    config = VocoderConfig()
    for S in (256, 511, 512, 28800):
        assert log_mel(chirp(S), config).shape == (1, 80, S // 256)
    odd = VocoderConfig(n_fft=511)  # an odd overlap: still S//hop frames
    assert log_mel(chirp(1024), odd).shape == (1, 80, 4)
    click = torch.zeros(1, 5120)
    click[0, int(7.5 * 256)] = 1  # the centre of frame 7
    mel = log_mel(click, config).mean(1)[0]
    assert mel.argmax() == 7 and abs(mel[6] - mel[8]) < 1e-4
    wave = 0.05 * noise(2, 5120)
    close((log_mel(10 * wave, config) - log_mel(wave, config)).mean(), 1.0)
    assert (log_mel(torch.zeros(1, 512), config) == -5).all()


def test_vocoder_log_mel_is_float32_and_differentiable_in_silence():
    wave = torch.zeros(1, 1024, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mel = log_mel(wave, VocoderConfig())
        assert torch.equal(log_mel(chirp(2048), SMALL), log_mel(chirp(2048).double(), SMALL))
    assert mel.dtype == torch.float32
    mel.sum().backward()
    assert wave.grad.isfinite().all()


@pytest.mark.parametrize("wave, says", [
    (torch.zeros(512), r"\(B, S\)"), (torch.zeros(1, 512, dtype=torch.int16), "int16"),
    (torch.zeros(1, 255), "at least 256")])
def test_vocoder_log_mel_refuses(wave, says):
    with pytest.raises(ValueError, match=says):
        log_mel(wave, VocoderConfig())


@pytest.mark.parametrize("changes, says", [
    ({"ratios": (8, 8, 2)}, "128, not to hop 256"), ({"n_fft": 128}, "n_fft 128"), ({"f_max": 9000.0}, "8000"),
    ({"f_min": 8000.0}, "f_min"), ({"base": 0}, "base is 0"), ({"residual_blocks": 0}, "residual_blocks")])
def test_vocoder_config_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        VocoderConfig(**changes)


@pytest.mark.parametrize("names, suffix", [
    *((names, suffix) for names in ("old", "new", "folded") for suffix in (".pt", ".safetensors")),
    ("data parallel", ".pt"), ("in a checkpoint", ".pt"), ("old", ".legacy.pt")])
def test_vocoder_generator_equals_melgan_from_every_layout(tmp_path, names, suffix):
    state = published_state()
    if names == "new":
        state = {k.replace("weight_g", "parametrizations.weight.original0")
                 .replace("weight_v", "parametrizations.weight.original1"): x for k, x in state.items()}
    elif names == "folded":
        state = fold_weight_norm(state)
    elif names == "data parallel":
        state = {"module." + k: x for k, x in state.items()}
    elif names == "in a checkpoint":
        state = {"generator": state, "step": 3}
    path = tmp_path / ("generator" + suffix)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    vocoder = vocoder_module.load(path)
    assert vocoder.config == VocoderConfig(sample_rate=22050, n_fft=1024, f_max=11025.0, base=4)
    with torch.no_grad():
        wave = vocoder(1.5 * scattered((1, 80, 12), "mel") - 2)
    assert wave.shape == (1, 3072) and not vocoder.training
    close(wave[0, [0, 100, 700, 1500, 2222, 3071]], [-0.117985, 0.128841, -0.509539, -0.078238, -0.394746, -0.013165])
    close(wave.abs().mean(), 0.3573007)


def test_vocoder_discriminator_equals_melgans():
    """Weights by the position of the convolution; the original's, 3 scales of 16 channels and 4 strided layers."""
    discriminator = Discriminator()
    plain = {n.removesuffix(".bias"): x.shape for n, x in discriminator.state_dict().items() if n.endswith(".bias")}
    ours = discriminator.state_dict()
    for i, stem in enumerate(plain):
        length, direction = (f"{stem}.parametrizations.weight.original{k}" for k in (0, 1))
        ours[f"{stem}.bias"] = 0.1 * scattered(plain[stem], f"{i}.bias")
        ours[length] = 1.6 * (1.2 + 0.2 * scattered(ours[length].shape, f"{i}.weight_g"))
        ours[direction] = scattered(ours[direction].shape, f"{i}.weight_v")
    discriminator.load_state_dict(ours)
    with torch.no_grad():
        results = discriminator(chirp(4096))
    scores = [[3.333054, -1.070282, 2.371992], [0.637461, -0.186801, -0.456361], [-0.660497, -1.671845, 0.639841]]
    means = [[0.448804, 0.295889, 0.254989, 0.341791, 0.43589, 1.025089, 2.427577],
             [0.079251, 0.080299, 0.076019, 0.101364, 0.121703, 0.235988, 0.562332],
             [0.151475, 0.146544, 0.178008, 0.238415, 0.243236, 0.407601, 1.066181]]
    for features, score, mean in zip(results, scores, means, strict=True):
        close(features[-1][0, 0, [0, features[-1].shape[2] // 2, -1]], score)
        close([x.abs().mean() for x in features], mean)


def random_vocoder(config=SMALL):
    """A vocoder whose output is neither near zero nor clipped."""
    torch.manual_seed(0)
    vocoder = Vocoder(config).eval()
    with torch.no_grad():
        for x in vocoder.parameters():
            x.mul_(1.6)
        assert 0.05 < vocoder(noise(1, config.mel_bins, 50)).std() < 0.7
    return vocoder


def test_vocoder_decode_in_chunks_equals_forward():
    for config in (SMALL, VocoderConfig(base=4, hop=300, n_fft=1200, ratios=(5, 5, 4, 3), residual_blocks=4)):
        vocoder = random_vocoder(config)
        for L in (vocoder.least_frames, 9, 33):
            mel = noise(2, 80, L)
            with torch.no_grad():
                wave = vocoder(mel)
            assert wave.shape == (2, L * config.hop)
            for chunk in (1, 8, 64):
                torch.testing.assert_close(vocoder.decode(mel, chunk), wave, rtol=0, atol=1e-5)


def test_vocoder_context_and_shortest_mels():
    vocoder, mel = random_vocoder(), noise(1, 80, 40)
    changed = mel.clone()
    changed[:, :, 20] += 1
    frames = (vocoder.decode(mel) - vocoder.decode(changed)).abs().reshape(40, 256).amax(1).nonzero()
    assert vocoder.context == 7 and 20 - 7 <= frames.min() <= 15 and 25 <= frames.max() <= 20 + 7
    for L in (0, 1, 3):
        assert vocoder.decode(mel[:, :, :L]).shape == (1, L * 256)
    for wrong in (mel[:, :, :3], mel[:, :79], mel[0]):
        with pytest.raises(ValueError, match="expected a mel"):
            vocoder(wrong)


def test_vocoder_weight_norm_folds_and_trains():
    vocoder = random_vocoder()
    mel, plain = noise(1, 80, 8), list(vocoder.state_dict())
    before = vocoder(mel)
    add_weight_norm(vocoder)
    torch.testing.assert_close(vocoder(mel), before, rtol=0, atol=1e-5)
    vocoder(mel).square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in vocoder.parameters())
    with torch.no_grad():
        for x in vocoder.parameters():
            x.mul_(1.1)
    folded = vocoder.folded()
    assert list(folded.state_dict()) == plain
    torch.testing.assert_close(folded(mel), vocoder(mel), rtol=0, atol=1e-5)


def test_vocoder_losses_have_their_closed_forms_and_hifigans_mel():
    ones, zeros = ([[torch.full((2, 4, 5), x), torch.full((2, 1, 5), x)]] * 3 for x in (1.0, 0.0))
    assert discriminator_loss(ones, zeros) == 0 and discriminator_loss(zeros, ones) == 6
    wave = chirp(8000)
    other = wave * 0.5 + 0.1 * scattered((1, 8000), "other")
    loss = generator_loss(ones, zeros, wave, other, VocoderConfig())
    assert loss.adversarial == 3 and loss.features == 6
    close(loss.mel, 1.852958, 1e-4)  # HiFi-GAN's own, which adds 1e-9 to the power
    close(loss.total, 3 + 2 * 6 + 45 * 1.852958, 1e-2)
    assert generator_loss(zeros, ones, wave, wave, VocoderConfig()).total == 2 * 6
    close(mel_loss(noise(1, 8000) / 2, noise(1, 8000), VocoderConfig()), math.log(2))


def test_vocoder_generator_loss_reaches_the_generator_only():
    config = DiscriminatorConfig(scales=2, base=4, layers=2, max_channels=32)
    discriminator, vocoder = Discriminator(config), random_vocoder()
    wave, target = vocoder(scattered((1, 80, 8), "mel")), chirp(2048)
    real, fake = discriminator(target), discriminator(wave)
    assert [len(x) for x in real] == [5, 5] and real[1][-1].shape[1] == 1
    generator_loss(real, fake, target, wave, SMALL).total.backward()
    assert vocoder.first.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="multiple of 4"):
        DiscriminatorConfig(base=6)


def test_vocoder_multi_resolution_stft():
    wave = 0.3 * noise(2, 8000)
    assert multi_resolution_stft(wave, wave).tolist() == [0, 0]
    close(multi_resolution_stft(2 * wave, wave), [1 + math.log(2)] * 2, 1e-3)
    for silence in ((0 * wave, wave), (wave, 0 * wave)):
        assert multi_resolution_stft(*silence).isfinite().all()
    with pytest.raises(ValueError, match="two waves"):
        multi_resolution_stft(wave, wave[:, :-1])


def test_vocoder_griffin_lim_finds_the_tone():
    config, t = VocoderConfig(), torch.arange(16000) / 16000
    wave = 0.5 * torch.sin(2 * math.pi * 1000 * t)[None]
    mel = log_mel(wave, config)
    made = griffin_lim(mel, config)
    assert made.shape == (1, 62 * 256) and torch.equal(made, griffin_lim(mel, config))
    assert abs(torch.fft.rfft(made[0]).abs().argmax() * 16000 / made.shape[1] - 1000) < 20  # Hz
    true, rough = wave[:, : made.shape[1]], griffin_lim(mel, config, iterations=0)
    assert mel_loss(made, true, config) < mel_loss(rough, true, config)
    assert made.std() == pytest.approx(wave.std(), rel=0.25)


@pytest.mark.parametrize("spoil, says", [
    (lambda s: s.pop("model.3.bias"), "missing: model.3.bias; extra: none"),
    (lambda s: s.pop("model.3.weight_g"), "missing: model.3.weight; extra: model.3.weight_v"),
    (lambda s: s.update({f"extra.{i}": torch.zeros(1) for i in range(9)}), r"extra: extra.0, .*\(9 in all\)"),
    (lambda s: s.update({"model.5.shortcut.bias": torch.zeros(7)}), r"model.5.shortcut.bias is \(7,\).*\(32,\)"),
    (lambda s: (s.clear(), s.update({"conv_pre.weight": torch.zeros(1)})), "looks like a HiFi-GAN generator"),
    (lambda s: (s.clear(), s.update({"model.disc_0.model.layer_0.1.bias": torch.zeros(1)})), "discriminator"),
    (lambda s: (s.clear(), s.update({"linear.weight": torch.zeros(1)})), "looks like another network"),
    (lambda s: (s.clear(), s.update({"step": 3})), "a dict of step"),
])
def test_vocoder_load_says_what_is_wrong(tmp_path, spoil, says):
    state = published_state()
    spoil(state)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt: .*" + says) as caught:
        vocoder_module.load(tmp_path / "odd.pt")
    assert "\n" not in str(caught.value)


def test_vocoder_load_never_unpickles_code(tmp_path):
    torch.save({"model.1.weight": Path("x"), "more": print}, tmp_path / "code.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name in ("code.pt", "noise.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: neither"):
            vocoder_module.load(tmp_path / name)


def test_vocoder_convert_writes_ours(tmp_path, capsys):
    torch.save(published_state(), tmp_path / "melgan.pt")
    out = tmp_path / "ours.safetensors"
    mel_of_it = ["--sample-rate", "16000", "--n-fft", "512"]
    assert vocoder_module.main(["convert", str(tmp_path / "melgan.pt"), str(out), *mel_of_it]) == 0
    ours, theirs = vocoder_module.load(out), vocoder_module.load(tmp_path / "melgan.pt")
    assert ours.config == VocoderConfig(base=4) and cmmd.load(out, Vocoder).config == ours.config
    mel = scattered((1, 80, 6), "mel")
    assert torch.equal(ours.decode(mel), theirs.decode(mel))
    with pytest.raises(ValueError, match="carries its own"):
        vocoder_module.load(out, sample_rate=8000)
    capsys.readouterr()
    for bad in ([str(tmp_path / "none.pt"), str(out)], [str(tmp_path / "melgan.pt"), str(tmp_path / "ours.bin")],
                [str(tmp_path / "melgan.pt"), str(out), "--f-max", "99999"]):
        assert vocoder_module.main(["convert", *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_vocoder_convert_command(tmp_path):
    """`python vocoder.py convert`, run as a user runs it, from another folder."""
    torch.save(published_state(), tmp_path / "melgan.pt")
    command = [sys.executable, str(Path(vocoder_module.__file__)), "convert"]
    done = subprocess.run([*command, "melgan.pt", "ours.safetensors"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "0.1 M parameters" in done.stdout, done.stderr
    assert vocoder_module.load(tmp_path / "ours.safetensors").config.base == 4


def test_vocoder_log_mel_of_pieces_is_that_of_the_whole():
    wave = noise(2, 256 * (2 * vocoder_module.CHUNK + 5) + 77) / 10
    config = VocoderConfig()
    mel = log_mel(wave, config)
    assert mel.shape == (2, 80, 2 * vocoder_module.CHUNK + 5)
    spectrum = torch.stft(torch.nn.functional.pad(wave, (128, 128), mode="reflect"), 512, 256,
                          window=torch.hann_window(512), center=False, return_complex=True).abs()
    assert torch.allclose(mel, (mel_filters(config) @ spectrum).clamp(min=1e-5).log10(), atol=1e-5)


# ==== data: media


def ffmpeg(*arguments, stdin=b""):
    """Run ffmpeg quietly; arguments are words or strings of words."""
    from imageio_ffmpeg import get_ffmpeg_exe

    words = [w for a in arguments for w in (a.split() if isinstance(a, str) else [str(a)])]
    subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", "-y", *words], input=stdin, check=True)


def numbered(path, fps, frames, size="32x32", options="-c:v qtrle", inputs=""):
    """A video whose frame i is flat, with i in its red and green: time burnt in."""
    W, H = (int(n) for n in size.split("x"))
    i = np.arange(frames)
    colour = np.stack([i % 16 * 16 + 8, i // 16 % 16 * 16 + 8, 0 * i], 1).astype(np.uint8)
    video = np.broadcast_to(colour[:, None, None], (frames, H, W, 3)).tobytes()
    ffmpeg(f"-f rawvideo -pix_fmt rgb24 -s {size} -r {fps} -i pipe:0", inputs, options, path, stdin=video)
    return path


def numbers(video):
    """The numbers burnt into frames (T, H, W, 3) -> (T,) int."""
    red, green = (video.mean((1, 2))[:, c] // 16 for c in (0, 1))
    return (red + 16 * green).astype(int)


def beep_and_flash(path, at, seconds=3.0, options="", sound_delay=0.0):
    """25 fps; the picture turns white at `at` s and a beep starts then; the sound's stream starts sound_delay late."""
    frames = np.zeros((round(seconds * 25), 32, 32, 3), np.uint8)
    frames[round(at * 25):] = 255
    t = np.arange(round((seconds - sound_delay) * 16000)) / 16000 + sound_delay
    wave = (0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= at)).astype(np.float32)
    data.write_clip(path.parent / "beep.wav", audio=wave)
    ffmpeg("-f rawvideo -pix_fmt rgb24 -s 32x32 -r 25 -i pipe:0 -itsoffset", str(sound_delay),
           "-i", path.parent / "beep.wav", "-pix_fmt yuv420p", options, path, stdin=frames.tobytes())
    return path


def seen_and_heard(path):
    """Times in seconds of the first white frame (at 25 fps) and of the first loud sample."""
    seen = np.argmax(data.read_video(path, fps=25, size=8).mean((1, 2, 3)) > 128) / 25
    return seen, np.argmax(np.abs(data.read_audio(path)) > 0.1) / 16000


@pytest.mark.parametrize("rate", ["1", "5", "10", "12", "15", "20", "24", "25", "30000/1001", "30", "50", "60", "120"])
def test_data_frames_are_those_on_screen(tmp_path, rate):
    n = min(240, max(3, round(2.3 * eval(rate))))
    source = n / eval(rate)
    video = data.read_video(numbered(tmp_path / "a.mov", rate, n), size=16)
    assert video.dtype == np.uint8 and video.shape == (int(np.ceil(source * 10 - 0.01)), 16, 16, 3)
    wanted = (np.arange(len(video)) + 0.5) / 10
    since = (wanted - numbers(video) / eval(rate))[wanted <= n / eval(rate)]
    assert since.min() >= -0.001 and since.max() <= 1 / eval(rate) + 0.001
    if rate == "10":
        assert (numbers(video) == np.arange(n)).all()


@pytest.mark.parametrize("fps", [7.5, 25, 29.97])
def test_data_frames_of_varying_rate_are_those_on_screen(tmp_path, fps):
    n = 90
    times = np.round(np.arange(n) * 40 + 35 * np.sin(np.arange(n) / 2) ** 2 + (np.arange(n) > 40) * 700)  # ms
    where = "if(gt(N,40),700,0)+N*40+35*sin(N/2)*sin(N/2)"
    inputs = ["-vf", f"settb=1/1000,setpts='round({where})'"]
    i = np.arange(n)
    colour = np.stack([i % 16 * 16 + 8, i // 16 * 16 + 8, 0 * i], 1).astype(np.uint8)
    raw = np.broadcast_to(colour[:, None, None], (n, 32, 32, 3)).tobytes()
    ffmpeg("-f rawvideo -pix_fmt rgb24 -s 32x32 -r 25 -i pipe:0", *inputs,
           "-fps_mode passthrough -enc_time_base 1/1000 -c:v qtrle", tmp_path / "v.mov", stdin=raw)
    video = data.read_video(tmp_path / "v.mov", fps=fps, size=8)
    wanted = (np.arange(len(video)) + 0.5) / fps
    starts, ends = times / 1000, np.append(times[1:], np.inf) / 1000
    assert (starts[numbers(video)] <= wanted + 0.0011).all() and (ends[numbers(video)] >= wanted - 0.0011).all()
    assert len(video) == int(np.ceil((times[-1] + 40) / 1000 * fps - 0.05))


def test_data_stretches_and_chunks_equal_the_whole(tmp_path):
    path = numbered(tmp_path / "a.mp4", 25, 200, options="-c:v libx264 -g 40 -bf 3 -pix_fmt yuv444p -qp 0")
    whole = data.read_video(path, size=16)
    assert np.array_equal(data.read_video(path, size=16, start=3.0, seconds=2.0), whole[30:50])
    video = data.Video(path, size=16, chunk=7)
    chunks = list(video)
    assert [len(c) for c in chunks[:-1]] == [7] * 11 and np.array_equal(np.concatenate(chunks), whole)
    assert abs(video.seconds - 8.0) < 1e-3


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_data_rotation_is_applied_and_kept(tmp_path, angle):
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:20] = (200, 40, 40)  # the top, red
    plain, turned = tmp_path / "p.mp4", tmp_path / "r.mp4"
    data.write_clip(plain, np.repeat(frame[None], 10, 0))
    ffmpeg(f"-display_rotation {angle} -i", plain, "-c copy", turned)
    rotated = np.rot90(frame, angle // 90)
    H, W = rotated.shape[:2]
    wanted = rotated[(H - 64) // 2 : (H - 64) // 2 + 64, (W - 64) // 2 : (W - 64) // 2 + 64].astype(int)
    assert np.abs(data.read_video(turned)[4] - wanted).mean() < 12
    for kind in (".mp4", ".mkv", ".webm"):
        data.add_audio(turned, np.zeros(16000), 16000, tmp_path / f"sound{kind}")
        assert np.abs(data.read_video(tmp_path / f"sound{kind}")[4] - wanted).mean() < 14


@pytest.mark.parametrize("size, sar", [
    ("96x64", "1/1"), ("64x96", "1/1"), ("48x64", "2/1"), ("63x35", "1/1"), ("720x576", "16/15")])
def test_data_centre_square_of_square_pixels(tmp_path, size, sar):
    W, H = (int(n) for n in size.split("x"))
    ratio = eval(sar)
    x = (np.arange(W) + 0.5 - W / 2) * ratio  # in square pixels from the centre
    y = np.arange(H) + 0.5 - H / 2
    disc = (x[None] ** 2 + y[:, None] ** 2) < (min(W * ratio, H) * 0.4) ** 2
    frames = np.repeat((disc * 255).astype(np.uint8)[None, ..., None], 3, 3).tobytes()
    ffmpeg(f"-f rawvideo -pix_fmt rgb24 -s {size} -r 10 -i pipe:0 -vf setsar={sar} -c:v ffv1", tmp_path / "d.mkv",
           stdin=frames)
    got = data.read_video(tmp_path / "d.mkv")[0].astype(int)
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    assert np.abs(got[..., 0] - 255 * (x**2 + y**2 < 25.6**2)).mean() < 10


@pytest.mark.parametrize("kind, options", [
    ("mp4", "-c:v libx265 -x265-params log-level=error"), ("mkv", "-c:v libsvtav1 -preset 12 -svtav1-params lp=1"),
    ("webm", "-c:v libvpx -deadline realtime"), ("avi", "-c:v mjpeg -pix_fmt yuvj420p -q:v 2"),
    ("mov", "-c:v libx264 -pix_fmt yuv420p10le"), ("ts", "-c:v libx264 -pix_fmt yuv420p"), ("gif", ""),
])
def test_data_reads_what_ffmpeg_reads(tmp_path, kind, options):
    frames = np.zeros((12, 64, 96, 3), np.uint8)
    frames[:6], frames[6:] = (200, 60, 30), (40, 90, 200)
    path = tmp_path / f"a.{kind}"
    ffmpeg("-f rawvideo -pix_fmt rgb24 -s 96x64 -r 10 -i pipe:0", options, path, stdin=frames.tobytes())
    video = data.read_video(tmp_path / f"a.{kind}")
    assert video.shape == (12, 64, 64, 3)
    assert np.abs(video.astype(int).mean((1, 2)) - frames.mean((1, 2))).max() < 12


@pytest.mark.parametrize("kind, options, delay", [
    ("mp4", "", 0.0), ("mp4", "", 0.3), ("mkv", "-c:a libopus", 0.3), ("mp4", "-ss 0.4", 0.0),
    ("ts", "-c:v mpeg2video", 0.0),
    ("mov", "-output_ts_offset 5", 0.2), ("mp4", "-filter:v setpts=PTS+0.2/TB -filter:a asetpts=PTS+0.2/TB", 0.0),
])
def test_data_sound_and_picture_stay_aligned(tmp_path, kind, options, delay):
    path = beep_and_flash(tmp_path / f"a.{kind}", 1.2, options=options, sound_delay=delay)
    seen, heard = seen_and_heard(path)
    assert abs(seen - heard) < 0.025, (seen, heard)
    wave = data.read_audio(path)
    data.add_audio(path, wave, 16000, tmp_path / "again.mp4")
    seen_again, heard_again = seen_and_heard(tmp_path / "again.mp4")
    assert abs(seen - seen_again) < 0.001 and abs(heard - heard_again) < 0.01


@pytest.mark.parametrize("picture_late", [True, False])
def test_data_picture_that_starts_late_keeps_its_sound(tmp_path, picture_late):
    """Streams that start 0.5 s apart: the sound before the picture is cut, or silence stands before the sound."""
    plain = beep_and_flash(tmp_path / "a.mp4", 1.2)
    late, first, second = tmp_path / "late.mp4", *((1, 0) if picture_late else (0, 1))
    ffmpeg("-i", plain, "-itsoffset 0.52 -i", plain, f"-map {first}:v -map {second}:a -c copy", late)
    seen, heard = seen_and_heard(late)
    assert abs((heard - seen) - (-0.52 if picture_late else 0.52)) < 0.03


@pytest.mark.parametrize("rate, channels", [(8000, 1), (44100, 2), (48000, 6), (96000, 2)])
def test_data_sound_of_any_rate_and_channels(tmp_path, rate, channels):
    t = np.arange(rate) / rate
    wave = np.repeat(0.3 * np.sin(2 * np.pi * 440 * t)[:, None], channels, 1).astype(np.float32)
    ffmpeg(f"-f f32le -ar {rate} -ac {channels} -i pipe:0 -c:a pcm_f32le", tmp_path / "a.wav", stdin=wave.tobytes())
    got = data.read_audio(tmp_path / "a.wav")
    assert got.dtype == np.float32 and abs(len(got) - 16000) <= 1
    assert abs(np.abs(np.fft.rfft(got)).argmax() - 440) <= 1 and 0.15 < np.abs(got[1000:-1000]).max() < 0.35


def test_data_mono_wave_survives_writing(tmp_path):
    wave = (0.4 * np.random.default_rng(0).standard_normal(16000).clip(-2, 2)).astype(np.float32)
    for kind in (".wav", ".flac"):
        data.write_clip(tmp_path / f"a{kind}", audio=wave)
        assert np.abs(data.read_audio(tmp_path / f"a{kind}") - wave).max() < 1e-4
    assert np.abs(data.read_audio(tmp_path / "a.wav", start=0.5, seconds=0.25) - wave[8000:12000]).max() < 1e-4


def test_data_cover_art_is_no_picture(tmp_path):
    data.write_clip(tmp_path / "a.wav", audio=np.sin(np.arange(8000) / 5))
    ffmpeg("-f lavfi -i color=red:s=64x64 -frames:v 1", tmp_path / "cover.png")
    ffmpeg("-i", tmp_path / "a.wav", "-i", tmp_path / "cover.png",
           "-map 0 -map 1 -disposition:v attached_pic", tmp_path / "a.mp3")
    assert abs(len(data.read_audio(tmp_path / "a.mp3")) / 16000 - 0.5) < 0.08
    with pytest.raises(ValueError, match="no picture") as error:
        data.read_video(tmp_path / "a.mp3")
    one_line(error, tmp_path / "a.mp3")


@pytest.mark.parametrize("kind", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_data_write_clip_round_trip(tmp_path, kind):
    level = np.linspace(40, 220, 18).astype(np.uint8)
    video = np.broadcast_to(level[:, None, None, None], (18, 64, 64, 3)).copy()
    wave = (0.5 * np.sin(2 * np.pi * 500 * np.arange(28800) / 16000)).astype(np.float32)
    wave[:16000] = 0
    data.write_clip(tmp_path / f"a{kind}", video, wave)
    back = data.read_video(tmp_path / f"a{kind}")
    assert back.shape == video.shape and np.abs(back.astype(int) - video).mean() < 8
    if kind != ".gif":
        heard = data.read_audio(tmp_path / f"a{kind}")
        assert abs(len(heard) - 28800) < 320 and abs(np.argmax(np.abs(heard) > 0.1) - 16000) < 160
    assert [p.name for p in tmp_path.iterdir()] == [f"a{kind}"]


@pytest.mark.parametrize("kind", [".mp4", ".mkv", ".mov"])
def test_data_add_audio_copies_the_picture(tmp_path, kind):
    path = beep_and_flash(tmp_path / "a.mp4", 1.0, seconds=2.6)
    data.add_audio(path, np.zeros(100), 16000, tmp_path / f"b{kind}")
    raw = [tmp_path / "1.h264", tmp_path / "2.h264"]
    for source, bare in zip((path, tmp_path / f"b{kind}"), raw):
        ffmpeg("-i", source, "-map 0:v -c copy -bsf:v h264_mp4toannexb", bare)
    assert raw[0].read_bytes() == raw[1].read_bytes()
    assert abs(len(data.read_audio(tmp_path / f"b{kind}")) / 16000 - 2.6) < 0.02


def test_data_add_audio_encodes_what_does_not_fit(tmp_path):
    path = beep_and_flash(tmp_path / "a.mp4", 1.0, seconds=2.0)
    data.add_audio(path, np.zeros(40000), 16000, tmp_path / "b.webm")
    assert abs(len(data.read_audio(tmp_path / "b.webm")) / 16000 - 2.0) < 0.02
    assert np.abs(data.read_video(path).astype(int) - data.read_video(tmp_path / "b.webm")).mean() < 4
    with pytest.raises(ValueError, match="; use .mp4"):
        data.add_audio(path, np.zeros(9), 16000, tmp_path / "b.avi")


@pytest.mark.parametrize("name, content, hint", [
    ("missing.mp4", None, "no such file"), ("empty.mp4", b"", "0 bytes"),
    ("text.mp4", b"hello world, I am text\n" * 50, "media"),
    ("text.txt", b"hello world\n" * 50, "media"), ("noise.webm", bytes(range(256)) * 9, "media"),
    ("lfs.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
])
def test_data_bad_input_is_refused_in_one_line(tmp_path, name, content, hint):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for read in (data.read_video, data.read_audio):
        with pytest.raises(ValueError, match=hint) as error:
            read(path)
        one_line(error, path)


def test_data_folders_truncated_headers_and_missing_streams_are_refused(tmp_path):
    good = beep_and_flash(tmp_path / "a.mp4", 1.0)
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:2000])
    numbered(tmp_path / "mute.mov", 10, 5)
    data.write_clip(tmp_path / "a.wav", audio=np.zeros(800))
    for read, path in ((data.read_video, tmp_path), (data.read_video, tmp_path / "cut.mp4"),
                       (data.read_audio, tmp_path / "mute.mov"), (data.read_video, tmp_path / "a.wav")):
        with pytest.raises(ValueError) as error:
            read(path)
        one_line(error, path)


def test_data_corrupt_stretch_is_read_around_with_a_warning(tmp_path):
    path = numbered(tmp_path / "a.mp4", 25, 200, size="64x64",
                    options="-c:v libx264 -g 10 -pix_fmt yuv420p -movflags +faststart")
    content = bytearray(path.read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"\d s of 8.00 s missing"):
        video = data.read_video(path)
    assert video.shape == (80, 64, 64, 3)


@pytest.mark.parametrize("kind, options", [
    ("mp4", "-movflags +faststart"), ("mkv", ""), ("webm", "-deadline realtime -cpu-used 8")])
def test_data_file_cut_short_is_read_as_far_as_it_goes(tmp_path, kind, options):
    noise = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), dtype=np.uint8).tobytes()
    path = tmp_path / f"a.{kind}"
    ffmpeg("-f rawvideo -pix_fmt rgb24 -s 32x32 -r 10 -i pipe:0 -pix_fmt yuv420p", options, path, stdin=noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"\d s of 6.00 s missing"):
        video = data.read_video(path)
    assert 20 < len(video) < 40


def test_data_output_is_checked_first_and_never_half_written(tmp_path):
    video = np.zeros((3, 16, 16, 3), np.uint8)
    for path in (tmp_path / "a.xyz", tmp_path / "a", tmp_path / "none" / "a.mp4"):
        with pytest.raises(ValueError) as error:
            data.write_clip(path, video)
        one_line(error, path)
    (tmp_path / "old.mp4").write_bytes(b"old")
    with pytest.raises(ValueError):
        data.write_clip(tmp_path / "old.mp4", video.astype(float))
    assert (tmp_path / "old.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


REFUSED = {"git_lfs_pointer.mp4": "git lfs pull", "result.webm": "0 bytes", "with-attached-pic.mp3": "no picture"}


@pytest.mark.skipif(not (SHARED / "awkward").is_dir(), reason="needs the real media of ../shared/data")
def test_data_awkward_files_work_or_are_refused_in_one_line(tmp_path):
    for path in sorted((SHARED / "awkward").iterdir()):
        if path.name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[path.name]) as error:
                data.read_video(path)
            one_line(error, path)
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            video = data.read_video(path)
        assert len(video) and (len(caught) == (path.name == "corrupted.mp4")), path
    assert len(data.read_audio(SHARED / "awkward" / "with-attached-pic.mp3")) > 15000


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="needs the real media of ../shared/data")
def test_data_real_clips_read_with_sound_of_the_pictures_length():
    for path in sorted((SHARED / "clips").iterdir()):
        video, audio = data.read_video(path), data.read_audio(path)
        assert video.shape[1:] == (64, 64, 3) and abs(len(video) / 10 - len(audio) / 16000) < 0.25, path


# ==== data: the world bounce


def test_data_bounce_is_a_function_of_its_seed():
    clip, again, other = bounce(5), bounce(5), bounce(6)
    assert clip.video.shape == (18, 64, 64, 3) and clip.video.dtype == np.uint8
    assert clip.audio.shape == (28800,) and clip.audio.dtype == np.float32 and np.abs(clip.audio).max() <= 1
    for a, b in zip(clip, again):
        assert np.array_equal(a, b)
    assert not np.array_equal(clip.video, other.video) and not np.array_equal(clip.audio, other.audio)
    for changed in (bounce(5, fps=25, size=32), bounce(5, size=0)):  # drawn otherwise, the same events and sound
        assert np.array_equal(changed.times, clip.times) and np.array_equal(changed.audio, clip.audio)
    assert bounce(5, seconds=3.64, fps=25, size=16).video.shape == (91, 16, 16, 3)


def test_data_bounce_touches_are_few_and_apart():
    clips = [bounce(seed, size=0) for seed in range(300)]
    assert {len(clip.times) for clip in clips} == {1, 2, 3, 4, 5}
    assert set(np.concatenate([clip.kinds for clip in clips])) == set(range(5))
    for clip in clips:
        assert len(clip.times) == len(clip.kinds) and clip.times.min() >= 0 and clip.times.max() < 1.8
        assert np.diff(clip.times).min(initial=1) >= 0.14 - 1e-9 and 1 <= len(set(clip.kinds)) <= 3
    assert 1 <= len(bounce(3, seconds=20, size=0).times) <= 56


def test_data_bounce_touch_is_at_the_floor():
    """Every ball is on the floor at its own touches and nowhere else, and is drawn there."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        touches = data._draw_touches(rng, 1.8)
        for ball in {b for _, b, _ in touches}:
            body, mine = data._Ball(rng, ball, 2, touches, 4.0, 5.3), [t for t, b, _ in touches if b == ball]
            assert np.abs([body.position(t)[1] for t in mine]).max() < 1e-9
            between = (np.array(mine[1:]) + mine[:-1]) / 2
            assert all(body.position(t)[1] > 4.0 / 2 * 0.17**2 for t in between)
            for t in (mine[len(mine) // 2], mine[len(mine) // 2] + 0.1):
                frame = np.zeros((128, 128, 3), np.float32)
                body.draw(frame, t, 0.8, 1.0, False)
                lowest = np.nonzero(frame.sum((1, 2)) > 0.5)[0].max(initial=-1) + 1
                assert lowest == -1 + 1 or abs(lowest / 128 - (0.8 - body.position(t)[1])) < 0.03


def test_data_bounce_every_touch_is_heard():
    for seed in range(100):
        clip = bounce(seed, size=0)
        click = np.abs(np.diff(clip.audio, 2)) ** 2  # high frequencies: the click, not the rings
        for time in clip.times:
            first = round(time * 16000)
            if 64 < first < len(click) - 64:
                assert click[first : first + 64].mean() > 4 * click[first - 64 : first - 2].mean(), (seed, time)


def test_data_held_out_seeds_are_never_trained_on():
    drawn = {train.clip_seed(s, step, i, 16) for s in (0, 1) for step in (0, 1, 50_000) for i in range(16)}
    assert len(drawn) == 96 and min(drawn) >= TRAINING_SEED
    held_out = (sampling.DEMO_SEED, evaluate.TEST_SEED, evaluate.TEST_SEED + 10_000, train.VALIDATION_SEED + 10_000)
    assert max(held_out) < TRAINING_SEED


# ==== data: caches


def write_tones(folder, count=3, picture=False):
    """Files of 0.3 s, every third of 0.9 s: file k is a tone of loudness k/100 and, with `picture`, grey of level k."""
    folder.mkdir(exist_ok=True)
    for k in range(1, count + 1):
        t = np.arange(4800 * (3 if k % 3 == 0 else 1)) / 16000
        frames = np.full((10 * len(t) // 16000, 16, 16, 3), k, np.uint8) if picture else None
        tone = k / 100 * np.sin(2 * np.pi * 997.3 * t)  # ffmpeg takes some tones that repeat after 32 bytes for MPEG
        data.write_clip(folder / f"{k}.{'mkv' if picture else 'wav'}", frames, tone)


def test_data_cache_decodes_once_and_names_what_it_skips(tmp_path, monkeypatch, capsys):
    write_tones(tmp_path / "media")
    (tmp_path / "media" / "deep").mkdir()
    data.write_clip(tmp_path / "media" / "deep" / "silent.mp4", np.zeros((5, 16, 16, 3), np.uint8))
    (tmp_path / "media" / "notes.txt").write_text("no media")
    inside = tmp_path / "media" / "cache"  # a cache inside the tree is not its own source
    first = data.cache_sounds(tmp_path / "media", inside)
    said = capsys.readouterr().out
    assert first.names == ("1.wav", "2.wav", "3.wav") and first.lengths == (4800, 4800, 14400)
    assert "silent.mp4: has no sound" in said and "notes.txt: no media file" in said and "5 files, 2 of them" in said
    for index, name in enumerate(first.names):
        true = data.read_audio(tmp_path / "media" / name)
        assert np.abs(first.read(index) / 32767 - true).max() < 1 / 32767
        assert np.array_equal(first.read(index, 100, 200), first.read(index)[100:200])
    decoded = []
    read = data.read_audio
    monkeypatch.setattr(data, "read_audio", lambda path, *rest: decoded.append(path.name) or read(path, *rest))
    assert data.cache_sounds(tmp_path / "media", inside) == first and not decoded
    assert "silent.mp4: has no sound" in capsys.readouterr().out
    Path(first.paths[0]).write_bytes(Path(first.paths[0]).read_bytes()[:50])  # torn
    data.write_clip(tmp_path / "media" / "2.wav", audio=np.zeros(3200))  # another sound than before
    again = data.cache_sounds(tmp_path / "media", inside)
    assert decoded == ["1.wav", "2.wav"] and again.lengths == (4800, 3200, 14400)
    assert again.fingerprint() != first.fingerprint() == replace(first).fingerprint()


def test_data_cache_of_frames(tmp_path):
    write_tones(tmp_path / "media", picture=True)
    write_tones(tmp_path / "media")  # sounds alone have no frames
    files = data.cache_frames(tmp_path / "media", tmp_path / "cache", size=8, fps=10)
    assert files.names == ("1.mkv", "2.mkv", "3.mkv") and files.lengths == (3, 3, 9)
    drawn = files.frames(5, 300)
    assert drawn.shape == (300, 8, 8, 3) and np.array_equal(drawn, files.frames(5, 300))
    levels = [round(float(files.read(i).mean())) for i in range(3)]
    shares = [np.mean(np.abs(drawn.mean((1, 2, 3)) - level) < 0.5) for level in levels]
    assert shares == pytest.approx([0.2, 0.2, 0.6], abs=0.1)


def test_data_cache_draws_stretches_and_joins_short_files(tmp_path):
    write_tones(tmp_path / "media")
    files = data.cache_sounds(tmp_path / "media", tmp_path / "cache")
    level = lambda wave: round(float(np.abs(wave).max()) * 100)
    starts = [files.wave(seed, 1600) for seed in range(300)]
    assert all(wave.shape == (1600,) and wave.dtype == np.float32 for wave in starts)
    assert [np.mean([level(w) == k for w in starts]) for k in (1, 2, 3)] == pytest.approx([0.2, 0.2, 0.6], abs=0.1)
    assert np.array_equal(files.wave(7, 1600), starts[7])
    long = files.wave(3, 40000)  # longer than all: several, each from its start
    assert long.shape == (40000,)
    pieces, at = [], 0
    while at < 40000:
        k = max(level(long[at : at + 100]), 1)
        n = min(files.lengths[k - 1], 40000 - at)
        assert np.array_equal((long[at : at + n] * 32767).round(), files.read(k - 1)[:n])
        pieces, at = [*pieces, k], at + n
    assert len(pieces) >= 3


def test_data_share_of_is_a_rule_of_names(tmp_path):
    names = [f"{k}.wav" for k in range(5000)]
    shares = [data.share_of(name) for name in names]
    counts = [shares.count(x) for x in ("test", "validation", "training")]
    assert counts == pytest.approx([200, 200, 4600], abs=50)
    assert shares == [data.share_of(f"/elsewhere/{name}") for name in names]
    assert {zlib.crc32(b"%d.wav" % k) % 25 for k, share in enumerate(shares) if share == "test"} == {0}
    files = data.FileCache(tuple(names), tuple(names), tuple(range(5000)))
    assert [files.share("test").lengths[0], len(files.share("training").paths)] == [shares.index("test"), counts[2]]


# ==== sample


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save(folder / "vae.safetensors", VAE(TINY_VAE))
    save(folder / "vocoder.safetensors", Vocoder(VocoderConfig(base=2, residual_blocks=1)))
    model = CMMD(CMMDConfig(**TINY))
    for out in (model.video_out[-1], model.audio_out[-1]):
        torch.nn.init.normal_(out.weight, std=0.02)
    save(folder / "cmmd.safetensors", model)
    return folder


@pytest.fixture(scope="module")
def models(weights):
    return load_models(weights, "cpu")


def moving_square(T, fps, size=64):
    """uint8 (T, size, size, 3)."""
    video = np.full((T, size, size, 3), 60, np.uint8)
    for k, frame in enumerate(video):
        x = int((k / fps * 20) % (size - 8))
        frame[size // 2 : size // 2 + 8, x : x + 8] = (250, 80, 30)
    return video


@pytest.mark.parametrize("seconds", [0.04, 1.0, 2.44])
def test_sample_video_file_gets_sound_of_its_length(tmp_path, models, seconds):
    path = tmp_path / "in.mp4"
    data.write_clip(path, moving_square(round(seconds * 25), 25), fps=25)
    clip = sample(path, models=models, steps=2)
    assert clip.video.shape == (max(1, int(np.ceil(seconds * 10 - 0.01))), 64, 64, 3) and clip.video.dtype == np.uint8
    assert clip.audio.dtype == np.float32 and np.abs(clip.audio).max() <= 1
    assert abs(len(clip.audio) / 16000 - seconds) < 0.001
    clip.save(tmp_path / "out.mp4")
    assert abs(len(data.read_audio(tmp_path / "out.mp4")) / 16000 - seconds) < 0.02
    assert np.array_equal(data.read_video(tmp_path / "out.mp4"), data.read_video(path))


def test_sample_sound_gets_picture_and_both_are_made(tmp_path, models):
    data.write_clip(tmp_path / "a.wav", audio=0.3 * np.sin(np.arange(20001) / 9))
    clip = sample(audio=tmp_path / "a.wav", models=models, steps=2)
    assert clip.video.shape == (13, 64, 64, 3) and clip.audio.shape == (20001,)
    clip.save(tmp_path / "a.webm")
    assert data.read_video(tmp_path / "a.webm").shape == clip.video.shape
    both = sample(seconds=1.25, models=models, steps=2, seed=3)
    assert both.video.shape == (13, 64, 64, 3) and both.audio.shape == (20000,)
    again, other = (sample(seconds=1.25, models=models, steps=2, seed=s) for s in (3, 4))
    assert np.array_equal(both.audio, again.audio) and np.array_equal(both.video, again.video)
    assert not np.array_equal(both.audio, other.audio)


def test_sample_arrays_equal_files(tmp_path, models):
    video = moving_square(30, 10)
    floats = sample(video.astype(np.float32) / 255, fps=10, models=models, steps=2)
    bytes_ = sample(torch.from_numpy(video), fps=10, models=models, steps=2)
    assert np.array_equal(bytes_.video, video) and np.abs(floats.audio - bytes_.audio).max() < 1e-4
    fast = np.repeat(np.arange(60, dtype=np.uint8)[:, None, None, None], 3, 3) + np.zeros((60, 40, 72, 3), np.uint8)
    assert (sample(fast, fps=30, models=models, steps=1).video[:, 0, 0, 0] == np.arange(20) * 3 + 1).all()
    assert sample(fast, fps=30, seconds=1.0, models=models, steps=1).audio.shape == (16000,)
    wave = np.sin(np.arange(24000) / 30).astype(np.float32) / 2
    data.write_clip(tmp_path / "w.wav", audio=wave, sample_rate=24000)
    of_file = sample(audio=tmp_path / "w.wav", models=models, steps=1)
    of_array = sample(audio=np.stack([wave, wave], 1), sample_rate=24000, models=models, steps=1)
    assert np.abs(of_file.audio - of_array.audio).max() < 1e-3 and of_array.audio.shape == (16000,)


def test_sample_long_input_equals_its_parts_and_reports_progress(models):
    seen = []
    clip = sample(moving_square(150, 10), fps=10, models=models, steps=1, progress=lambda *a: seen.append(a))
    assert clip.audio.shape == (240000,) and [s for s in seen if s[0] == "reading"] == [
        ("reading", 64, 150), ("reading", 128, 150), ("reading", 150, 150)] and seen[-1] == ("making", 1, 1)


@pytest.mark.parametrize("kind", [".mp4", ".mov", ".mkv", ".webm", ".gif", ".wav", ".flac", ".png"])
def test_sample_clip_saves_every_type(tmp_path, kind):
    clip = Clip(moving_square(18, 10), np.zeros(28800, np.float32), 10, 16000)
    clip.save(tmp_path / f"a{kind}")
    if kind in (".wav", ".flac"):
        assert data.read_audio(tmp_path / f"a{kind}").shape == (28800,)
    elif kind != ".png":
        assert data.read_video(tmp_path / f"a{kind}").shape == (18, 64, 64, 3)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{kind}"]


def test_sample_part_of_a_video_keeps_that_part(tmp_path, models):
    data.write_clip(tmp_path / "in.mp4", moving_square(100, 25), fps=25)
    sample(tmp_path / "in.mp4", seconds=1.6, models=models, steps=1).save(tmp_path / "out.mp4")
    assert len(data.read_video(tmp_path / "out.mp4")) == 16
    assert abs(len(data.read_audio(tmp_path / "out.mp4")) / 16000 - 1.6) < 0.02


def decode_png(path):
    """An independent reader of 8 bit RGB PNGs without filters -> uint8 (H, W, 3)."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, body = 8, {}
    while at < len(raw):
        length, name = struct.unpack(">I4s", raw[at : at + 8])
        content = raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + content)
        body[name], at = content, at + 12 + length
    W, H = struct.unpack(">II", body[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(body[b"IDAT"]), np.uint8).reshape(H, 1 + 3 * W)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(H, W, 3)


def test_sample_png_is_exact_and_shows_when_it_sounds(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    sampling.write_png(tmp_path / "a.png", image)
    assert np.array_equal(decode_png(tmp_path / "a.png"), image)
    wave = np.zeros(32000, np.float32)
    wave[16000:] = np.sin(np.arange(16000))  # loud in the second half
    shown = sampling.picture(moving_square(20, 10), [wave], 10, 16000)
    spectrogram = shown[80 + 6 : 80 + 6 + 160].astype(int).sum((0, 2))
    assert spectrogram[500:].min() > spectrogram[:460].max()
    assert sampling.picture(moving_square(1, 10), [wave[:100]], 10, 16000, [0.001]).shape == shown.shape


@pytest.mark.parametrize("arguments, hint", [
    (["none.mp4", "-o", "o.mp4"], "no such file"), ([".", "-o", "o.mp4"], "folder"),
    (["empty.mp4", "-o", "o.mp4"], "0 bytes"),
    (["text.mp4", "-o", "o.mp4"], "media file"), (["sound.wav", "-o", "o.mp4"], "--audio"),
    (["in.mp4", "-o", "o.xyz"], "; use .mp4"),
    (["in.mp4", "-o", "none/o.mp4"], "does not exist"), (["in.mp4", "-o", "in.mp4"], "input itself"),
    (["in.mp4", "-o", "o.mp4", "--steps", "0"], "at least 1"), (["in.mp4", "-o", "o.mp4", "--steps", "x"], "--steps"),
    (["in.mp4", "-o", "o.mp4", "--seconds", "-1"], "above 0"),
    (["in.mp4", "-o", "o.mp4", "--weights", "no"], "weights"),
    (["in.mp4", "-o", "o.mp4", "--weights", "wrong"], "expected a VAE"),
    (["--audio", "in.mp4", "-o", "o.mp4"], "no sound"),
    (["in.mp4", "--audio", "sound.wav", "-o", "o.mp4"], "both"), (["-o", "o.mp4"], "nothing to make"),
    (["in.mp4", "-o", "o.mp4", "--device", "abacus"], "cannot be used"),
    (["in.mp4", "-o", "o.mp4", "--condition", "no"], "clean"),
])
def test_sample_command_line_refuses_in_one_line(tmp_path, weights, monkeypatch, capsys, arguments, hint):
    monkeypatch.chdir(tmp_path)
    data.write_clip("in.mp4", moving_square(5, 10))
    data.write_clip("sound.wav", audio=np.zeros(1600))
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("this is no video\n" * 9)
    Path("wrong").mkdir()
    for name in ("vae", "vocoder", "cmmd"):
        Path(f"wrong/{name}.safetensors").write_bytes((weights / "vocoder.safetensors").read_bytes())
    before = sorted(p.name for p in tmp_path.rglob("*"))
    try:
        code = sampling.main(arguments if "--weights" in arguments else [*arguments, "--weights", str(weights)])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and hint in err, err
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_sample_mismatched_vocoder_is_refused(tmp_path, weights):
    for name in ("vae", "cmmd"):
        (tmp_path / f"{name}.safetensors").write_bytes((weights / f"{name}.safetensors").read_bytes())
    save(tmp_path / "vocoder.safetensors", Vocoder(VocoderConfig(base=2, residual_blocks=1, sample_rate=22050)))
    with pytest.raises(ValueError, match="sample_rate is 22050"):
        load_models(tmp_path)


@pytest.mark.parametrize("given", [
    dict(video=np.zeros((3, 8, 8, 3), np.uint8)), dict(video=np.zeros((3, 8, 8), np.uint8), fps=10),
    dict(video=np.full((3, 8, 8, 3), 2.0), fps=10), dict(video=np.zeros((0, 8, 8, 3), np.uint8), fps=10),
    dict(audio=np.zeros(100)), dict(audio=np.zeros(0), sample_rate=16000),
    dict(audio=np.zeros(9, int), sample_rate=16000),
    dict(seconds=0), dict(steps=0, seconds=1), dict(steps=1.5, seconds=1), dict(condition="x", seconds=1),
])
def test_sample_arguments_are_checked(models, given):
    with pytest.raises(ValueError) as error:
        sample(models=models, **given)
    assert "\n" not in str(error.value)


def test_sample_script_runs_in_the_clone(tmp_path, weights):
    data.write_clip(tmp_path / "in.mp4", moving_square(10, 10))
    script = [sys.executable, str(REPO / "sample.py")]
    command = [*script, "in.mp4", "-o", "out.mkv", "--weights", str(weights), "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "out.mkv: 1.0 s\n", done.stderr
    assert data.read_video(tmp_path / "out.mkv").shape == (10, 64, 64, 3)


def test_sample_without_arguments_runs_the_demonstration(tmp_path, models, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "load_models", lambda *a: models)
    assert sampling.main([]) == 0 and "impacts marked" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.mp4", "demo.png"]
    assert abs(len(data.read_audio("demo.mp4")) / 16000 - sampling.DEMO_SECONDS) < 0.02
    assert decode_png(Path("demo.png")).shape[1] == 960


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="needs the real media of ../shared/data")
@pytest.mark.parametrize("folder", ["clips", "awkward"])
def test_sample_real_files_get_a_sound_or_one_line(tmp_path, models, folder):
    for path in sorted((SHARED / folder).iterdir()):
        if path.name in ("git_lfs_pointer.mp4", "result.webm", "with-attached-pic.mp3"):
            with pytest.raises(ValueError, match=path.name):
                sample(path, models=models)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clip = sample(path, models=models, steps=1, seconds=None if folder == "awkward" else 0.6)
            kind = ".mp4" if path.suffix == ".gif" else path.suffix
            clip.save(tmp_path / f"out{kind}")
            made = data.read_audio(tmp_path / f"out{kind}")
        assert abs(len(made) - len(clip.audio)) / 16000 < 0.02, path


# ==== train


class Stopped(Exception):
    """What a killed training leaves behind."""


def stop_after_saving(monkeypatch, step):
    """Let the next training end right after its checkpoint of that step."""
    original = train.State.save

    def save_and_stop(state, path):
        original(state, path)
        if state.step == step:
            raise Stopped

    monkeypatch.setattr(train.State, "save", save_and_stop)


def few_clips(monkeypatch):
    """Trainings draw many clips of the world: let 8 do."""
    drawn = cache(bounce)
    few = lambda seed, *rest, **settings: drawn(seed % 8, *rest, **settings)
    monkeypatch.setattr(train, "bounce", few)
    monkeypatch.setitem(train.WORLDS, "bounce", few)


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


TRAININGS = {
    "vae": ["--config", '{"channels": [8, 8, 8, 8], "blocks": 1, "groups": 4}'],
    "vocoder": ["--config", '{"base": 2, "residual_blocks": 1}', "--seconds", "0.512", "--adversarial-from", "3"],
    "cmmd": ["--config", json.dumps(TINY), "--first-lesson", "2"],
}


@pytest.mark.parametrize("task", ["vae", "vocoder", "cmmd"])
def test_train_resumed_equals_never_stopped(tmp_path, monkeypatch, weights, task):
    few_clips(monkeypatch)
    words = [task, "--steps", "6", "--batch", "2", "--workers", "0", "--save-every", "3", *TRAININGS[task]]
    if task == "cmmd":
        words += ["--vae", str(weights / "vae.safetensors")]
    assert not train.main([*words, "--out", str(tmp_path / "straight")])
    with monkeypatch.context() as patch:
        stop_after_saving(patch, 3)
        with pytest.raises(Stopped):
            train.main([*words, "--out", str(tmp_path / "stopped")])
    assert not (tmp_path / "stopped" / f"{task}.safetensors").exists()
    assert not train.main([*words, "--out", str(tmp_path / "stopped")])
    for name in (f"{task}.safetensors", f"{task}-checkpoint.safetensors"):
        assert same_tensors(tmp_path / "straight" / name, tmp_path / "stopped" / name)
    log = (tmp_path / "straight" / f"{task}-log.csv").read_text().splitlines()
    assert log[0].startswith("step,seconds,") and log[-1].startswith("6,")


def test_train_refuses_to_resume_with_other_settings(tmp_path, monkeypatch, capsys):
    few_clips(monkeypatch)
    words = ["vae", "--out", str(tmp_path), "--steps", "1", "--workers", "0", *TRAININGS["vae"]]
    assert not train.main([*words, "--batch", "2"])
    assert train.main([*words, "--batch", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "batch 2, not 3" in error


@pytest.mark.parametrize("words, says", [
    (["vae", "--config", '{"channels": [9]}'], "groups"), (["vae", "--config", '{"channels": 5}'], "channels"),
    (["vae", "--log-every", "0"], "--log-every"), (["vae", "--init", "x", "--config", '{"blocks": 1}'], "--init"),
    (["vae", "--init", "none.safetensors"], "no such file"), (["cmmd", "--vae", "none.safetensors"], "no such file"),
    (["vae", "--out", "file"], "file"), (["vae", "--config", '{"bands": 3}'], "bands"),
    (["vae", "--steps", "0"], "steps"),
    (["cmmd", "--vae", "x", "--batch", "0"], "batch"), (["vae", "--device", "abacus"], "abacus"),
])
def test_train_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert train.main([words[0], "--out", "out", *words[1:], "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error and not list(tmp_path.rglob("*.safetensors")), error


def test_train_learning_rate_warms_up_and_comes_down():
    args = type("Args", (), dict(lr=1.0, warmup=10, steps=110, decay="cosine", gamma=0.9))
    rates = [train.learning_rate(step, args) for step in range(110)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[60] == pytest.approx(0.51)
    assert np.diff(rates[10:]).max() < 0 and 0.02 <= rates[-1] < 0.03
    args.decay = "exponential"
    rates = [train.learning_rate(step, args) for step in range(110)]
    assert rates[9:13] == pytest.approx([1.0, 1.0, 0.9, 0.81]) and rates[109] == pytest.approx(0.9**99)


@pytest.mark.parametrize("task", ["vae", "vocoder"])
def test_train_on_folders_resumed_equals_never_stopped(tmp_path, monkeypatch, capsys, task):
    few_clips(monkeypatch)
    write_tones(tmp_path / "media", picture=True)
    words = [task, "--steps", "6", "--batch", "4", "--workers", "0", "--save-every", "3", *TRAININGS[task],
             "--data", "bounce", str(tmp_path / "media"), "--decay", "exponential", "--cache", str(tmp_path / "cache")]
    assert not train.main([*words, "--out", str(tmp_path / "straight")])
    with monkeypatch.context() as patch:
        stop_after_saving(patch, 3)
        with pytest.raises(Stopped):
            train.main([*words, "--out", str(tmp_path / "stopped")])
    assert not train.main([*words, "--out", str(tmp_path / "stopped")])
    for name in (f"{task}.safetensors", f"{task}-checkpoint.safetensors"):
        assert same_tensors(tmp_path / "straight" / name, tmp_path / "stopped" / name)
    data.write_clip(tmp_path / "media" / "more.mp4", np.zeros((5, 16, 16, 3), np.uint8), np.zeros(8000))
    capsys.readouterr()
    assert train.main([*words, "--out", str(tmp_path / "stopped")]) == 2
    assert "was started with files" in capsys.readouterr().err


def test_train_sources_take_turns_and_held_out_files_never_come(tmp_path):
    write_tones(tmp_path / "media", count=60)
    files = data.cache_sounds(tmp_path / "media", tmp_path / "cache")
    shares = {name: files.share(name) for name in ("training", "validation", "test")}
    seen = {name: {int((abs(share.wave(seed, 800)).max() * 100).round()) for seed in range(500)}
            for name, share in shares.items()}  # a tone's loudness is its file's number
    assert all(seen[name] == {int(Path(x).stem) for x in share.names} for name, share in shares.items())
    assert not seen["training"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    sounds = train.SoundBatches(3, 0, 0.05, sources=["bounce", shares["training"]])
    for step in (0, 1):
        for item, wave in enumerate(sounds[step][0], 3 * step):
            world = torch.from_numpy(bounce(train.clip_seed(0, item, 0, 1), 0.05, size=0).audio)
            assert torch.equal(wave, world) == (item % 2 == 0)
            assert item % 2 == 0 or int((wave.abs().max() * 100).round()) in seen["training"]


HELD_OUT = next(f"{k}.wav" for k in range(1000) if data.share_of(f"{k}.wav") != "training")


@pytest.mark.parametrize("name, says", [
    (None, "no such folder"), ("notes.txt", "none of its 1 files"), (HELD_OUT, "all of its files are held out")])
def test_train_refuses_data_in_one_line(tmp_path, capsys, name, says):
    if name:
        (tmp_path / "media").mkdir()
        (tmp_path / "media" / name).write_text("text")
    if name == HELD_OUT:
        data.write_clip(tmp_path / "media" / name, audio=noise(4000).numpy() / 10)
    words = ["vocoder", "--data", str(tmp_path / "media"), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error


# ==== evaluate


HOP_SECONDS = 256 / 16000


def clicks(times, pitch=700.0, seconds=1.8):
    """A synthetic train of decaying tones over silence -> wave (1, S) at 16 kHz."""
    t = np.arange(round(seconds * 16000)) / 16000
    ring = lambda x: np.where(t >= x, np.sin(2 * np.pi * pitch * (t - x)) * np.exp(-np.maximum(t - x, 0) / 0.05), 0)
    wave = sum(ring(x) for x in times)
    return torch.tensor(0.4 * wave + 0.0 * t, dtype=torch.float32)[None]


def true_mels(clips):
    return [log_mel(torch.from_numpy(clip.audio)[None], VocoderConfig())[0].numpy() for clip in clips]


def test_evaluate_match_known_values():
    assert len(evaluate.match([1, 2, 3], [1.1, 1.9, 5, 6, 10], 0.5)) == 2
    assert evaluate.match([], [1.0], 0.1) == [] and evaluate.match([1.0], [], 0.1) == []
    assert evaluate.match([0.3], [0.1 + 0.2], 0.0) == [(0, 0)]  # floats that differ, the same millisecond
    assert len(evaluate.match([1.0], [1.05], 0.05)) == 1 and len(evaluate.match([1.0], [1.051], 0.05)) == 0  # inclusive
    assert sorted(evaluate.match([2.0, 1.0], [1.01, 2.01], 0.05)) == [(0, 1), (1, 0)]  # order does not matter
    assert len(evaluate.match([1.0, 1.08], [1.04], 0.05)) == 1  # one to one
    assert len(evaluate.match([1.0, 1.1], [0.95, 1.05], 0.05)) == 2  # 1.0 must leave 1.05 to 1.1


def largest_matching(a, b, width):
    """Augmenting paths over every pair, in whole milliseconds: an independent maximum matching."""
    partner = {}

    def augment(i, seen):
        for j in range(len(b)):
            if abs(a[i] - b[j]) <= width and j not in seen:
                seen.add(j)
                if j not in partner or augment(partner[j], seen):
                    partner[j] = i
                    return True
        return False

    return sum(augment(i, set()) for i in range(len(a)))


def test_evaluate_match_is_maximum():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.integers(0, 400, rng.integers(0, 9)) for _ in range(2))
        pairs = evaluate.match(a / 1000, b / 1000, 0.05)
        assert len(pairs) == largest_matching(a, b, 50)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        assert all(abs(a[i] - b[j]) <= 50 for i, j in pairs)


def test_evaluate_match_equals_mir_eval():
    util = pytest.importorskip("mir_eval.util", reason="mir_eval is not installed")
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = (np.sort(rng.choice(4000, rng.integers(1, 40), replace=False)) for _ in range(2))
        assert len(evaluate.match(a / 1000, b / 1000, 0.1)) == len(util.match_events(a, b, 100))


def test_evaluate_scores_closed_forms():
    counts = evaluate.event_counts([[0.1, 0.5], [1.0]], [[0.1], [1.0, 1.4, 1.7]], 0.05)
    assert counts.tolist() == [[1, 2, 1], [1, 1, 3]]
    assert evaluate.scores(counts.sum(0)) == (4 / 7, 2 / 3, 2 / 4)  # 2m / (found + true), m / found, m / true
    assert np.isnan(evaluate.scores([0, 0, 0]).f1) and evaluate.scores([0, 0, 5]).f1 == 0
    with pytest.raises(ValueError, match="one list per clip"):
        evaluate.event_counts([[1.0]], [], 0.05)


def test_evaluate_chance():
    assert evaluate.chance([[0.1], [0.5], [0.9]], [[0.1], [0.5], [0.9]], 0.05).f1 == 0  # no clip fits another's
    assert evaluate.chance([[0.1], [0.1]], [[0.1], [0.1]], 0.05).f1 == 1
    rng = np.random.default_rng(0)  # one event each, uniform in 1 s: P(|a - b| <= w) = 2w - w^2
    found, true = rng.uniform(0, 1, (2, 300, 1))
    assert abs(evaluate.chance(found, true, 0.1).f1 - 0.19) < 0.02
    with pytest.raises(ValueError, match="two clips"):
        evaluate.chance([[1.0]], [[1.0]], 0.05)


def test_evaluate_bootstrap():
    same = np.tile([3, 4, 5], (50, 1))
    assert evaluate.bootstrap(same, lambda c: evaluate.scores(c).f1) == pytest.approx((2 / 3, 2 / 3))
    coin = np.stack([np.arange(400) % 2, np.ones(400, int)], axis=1)  # mean 1/2, standard error 0.025
    low, high = evaluate.bootstrap(coin, evaluate.share)
    assert abs(low - 0.451) < 0.006 and abs(high - 0.549) < 0.006
    assert (low, high) == evaluate.bootstrap(coin, evaluate.share)
    assert np.isnan(evaluate.bootstrap(np.zeros((5, 2)), evaluate.share)).all()


def test_evaluate_onsets_of_known_clicks():
    times = [0.2, 0.5, 0.71, 1.33, 1.6]
    found = evaluate.onsets(log_mel(clicks(times), VocoderConfig())[0].numpy(), HOP_SECONDS)
    assert len(found) == 5 and np.abs(found - times).max() < 0.02
    assert len(evaluate.onsets(np.full((80, 112), -5.0), HOP_SECONDS)) == 0  # silence
    assert len(evaluate.onsets(log_mel(clicks([]), VocoderConfig())[0].numpy(), HOP_SECONDS)) == 0


def test_evaluate_onset_flux_closed_form():
    mel = np.full((80, 6), -5.0)
    mel[:40, 3:] = -5.0 + 1.3  # half the bins rise by one unit, from below zero: flux 1/2, at frame 3 only
    assert np.allclose(evaluate.onset_flux(mel), [0, 0, 0, 0.5, 0, 0])
    assert evaluate.onsets(mel, HOP_SECONDS) == pytest.approx([3.5 * HOP_SECONDS - evaluate.ONSET_BIAS])


def test_evaluate_raw_ceiling_chance_and_pitch_of_bounce():
    clips = [bounce(seed) for seed in range(600_000, 600_060)]
    mels, true = true_mels(clips), [clip.times for clip in clips]
    found = [evaluate.onsets(mel, HOP_SECONDS) for mel in mels]
    assert evaluate.scores(evaluate.event_counts(found, true, 0.05).sum(0)).f1 >= 0.96
    assert 0.10 <= evaluate.chance(found, true, 0.05).f1 <= 0.25  # 0.18 over 1,000 clips
    errors = [f[i] - t[j] for f, t in zip(found, true) for i, j in evaluate.match(f, t, 0.05)]
    assert abs(np.mean(errors)) < 0.002
    pitch = evaluate.pitch_counts(mels, found, clips, HOP_SECONDS, evaluate.pitch_templates(VocoderConfig()))
    assert evaluate.share(pitch.sum(0)) >= 0.97


def test_evaluate_pitch_of_pure_tones():
    templates = evaluate.pitch_templates(VocoderConfig())
    for kind, pitch in enumerate(KIND_PITCH):
        for detune in (0.97, 1.0, 1.03):
            mel = log_mel(clicks([0.6], pitch * detune), VocoderConfig())[0].numpy()
            assert evaluate.pitch_kind(mel, 0.6, HOP_SECONDS, templates) == kind
    mel = log_mel(clicks([0.4], KIND_PITCH[0]) + 0.5 * clicks([0.6], KIND_PITCH[3]), VocoderConfig())[0].numpy()
    assert evaluate.pitch_kind(mel, 0.6, HOP_SECONDS, templates) == 3  # what is new counts, not what still rings
    assert evaluate.pitch_kind(mel, 0.0, HOP_SECONDS, templates) in range(5)  # at the edges too
    assert evaluate.pitch_kind(mel, 1.79, HOP_SECONDS, templates) in range(5)


def test_evaluate_envelope_correlation():
    rng = np.random.default_rng(0)
    mean = 10 * rng.standard_normal(100)
    a, b = rng.standard_normal((2, 50, 100))
    assert np.allclose(evaluate.envelope_correlation(a, 3 * a + 1), 1)
    assert np.allclose(evaluate.envelope_correlation(a, -a), -1)
    assert evaluate.envelope_correlation(a + mean, b + mean).mean() > 0.9  # the shared shape alone
    assert abs(evaluate.envelope_correlation(a + mean, b + mean, mean).mean()) < 0.05
    assert np.allclose(evaluate.envelope_correlation(a, b)[0], np.corrcoef(a[0], b[0])[0, 1])
    assert evaluate.envelope(np.ones((2, 80, 7))).shape == (2, 7)


def test_evaluate_psnr_and_baseline():
    a = torch.zeros(2, 3, 16, 16)
    assert evaluate.psnr(a, a + 0.1).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    flat = torch.full((2, 3, 16, 16), 0.4)
    assert torch.allclose(evaluate.bicubic_baseline(flat), flat, atol=1e-5)


def test_evaluate_command_refuses(capsys, tmp_path):
    for arguments, part in ((["worlds", "--n", "10", "--seed-start", "999999999"], "trained on"),
                            (["worlds", "--n", "1"], "at least 2"),
                            (["worlds", "--out", str(tmp_path / "table.txt")], ".json or .csv")):
        assert evaluate.main(arguments) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1


def test_evaluate_write_result(tmp_path):
    result = {"n": 2, "rows": [{"sound": "clean", "f1_50": 0.5, "onsets": [[0.1], []]}]}
    evaluate.write_result(tmp_path / "a.json", result)
    assert json.loads((tmp_path / "a.json").read_text()) == result
    evaluate.write_result(tmp_path / "a.csv", result)
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "sound,f1_50,onsets"


def test_evaluate_frechet_known_values():
    x = np.random.default_rng(0).standard_normal((60, 8)) @ np.random.default_rng(1).standard_normal((8, 8))
    centred = x - x.mean(0)
    assert evaluate.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet(x, x + 2) == pytest.approx(4 * 8)
    trace = (centred**2).sum() / 59
    assert evaluate.frechet(centred, 3 * centred) == pytest.approx(4 * trace)


def test_evaluate_vocoder_command(tmp_path, weights, capsys):
    write_tones(tmp_path / "tones", count=60)
    (tmp_path / "tones" / "notes.txt").write_text("no sound")
    (tmp_path / "embed.py").write_text("import numpy as np\ndef embed(wave):\n"
                                       "    return np.abs(np.fft.rfft(wave[:4096].reshape(2, -1)))[:, :8], 'scores'\n")
    words = ["vocoder", "--weights", str(weights / "vocoder.safetensors"), "--seconds", "0.5", "--out",
             str(tmp_path / "rows.json"), "--embedding", str(tmp_path / "embed.py"), "--n", "3"]
    assert not evaluate.main([*words, "--data", "bounce", str(tmp_path / "tones"), "--held-out"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    held_out = [name for name in map(str, range(1, 61)) if data.share_of(f"{name}.wav") == "test"]
    assert [row["n"] for row in rows] == [3, 3] + [min(3, len(held_out))] * 2
    assert [row["sound"] for row in rows[:2]] == ["Griffin-Lim", str(weights / "vocoder.safetensors")]
    lim, random = rows[2:]
    assert lim["mel_l1"] < 0.6 * random["mel_l1"]
    assert lim["stft"] < random["stft"] and lim["frechet"] < random["frechet"]
    assert lim["mel_l1_interval"][0] <= lim["mel_l1"] <= lim["mel_l1_interval"][1]
    assert "| bounce | 3 | Griffin-Lim |" in capsys.readouterr().out
    assert evaluate.main([*words, "--data", str(tmp_path / "none")]) == 2
    assert "holds 0 sounds" in capsys.readouterr().err


def test_evaluate_ports_mel_equals_librosas(tmp_path, capsys):
    pytest.importorskip("librosa")
    assert not evaluate.main(["ports", "--only", "mel", "--repeats", "1", "--out", str(tmp_path / "rows.json")])
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert row["apart"] < 1e-4 and min(row["seconds"]) > 0 and "| mel |" in capsys.readouterr().out


def test_evaluate_ports_say_what_is_missing(tmp_path, monkeypatch, capsys):
    for name in ("diffusers", "librosa", "librosa.feature"):
        monkeypatch.setitem(sys.modules, name, None)
    for what, names in (("VAE encode", "diffusers"), ("mel", "librosa")):
        assert evaluate.main(["ports", "--only", what]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and names in error and "pip install" in error
    assert evaluate.main(["ports", "--only", "MelGAN", "--melgan", str(tmp_path)]) == 2
    assert "modules.py: there is no such file; give a clone" in capsys.readouterr().err


def test_evaluate_memory_of_call_counts_what_is_held_at_once():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells a call's peak memory")
    two = evaluate.memory_of_call(lambda: (torch.ones(2**24) + torch.ones(2**24))[:1].clone())  # 3 x 64 MiB at once
    assert 150 < two < 260


# ==== packaging


def command(*words, cwd, env=None):
    """Run a command -> what it printed; its failure is a failed test that shows why."""
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A new environment with nothing but the built wheel; it sees torch and the like through a .pth file."""
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling: pip install -r requirements.txt")
    pytest.importorskip("pip", reason="building the wheel needs pip")
    folder = tmp_path_factory.mktemp("installed")
    command(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, REPO, cwd=folder)
    (wheel,) = folder.glob("cmmd-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    here = {str(Path(module.__file__).parent.parent) for module in (torch, np, pytest)}
    (site / "host.pth").write_text("\n".join(here))
    before = set(site.iterdir())
    command(python, "-m", "pip", "install", "--no-deps", "--ignore-installed", "--no-compile", wheel, cwd=folder)
    return python, site, {path.name for path in set(site.iterdir()) - before}


def test_packaging_only_the_package_lands(installed):
    _, site, landed = installed
    assert landed == {"cmmd", f"cmmd-{cmmd.__version__}.dist-info"}
    names = {path.name for path in (site / "cmmd").iterdir()}
    assert names == {"__init__.py", "weights"} | {
        f"{name}.py" for name in ("vae", "vocoder", "data", "sample", "train", "evaluate")}
    box = {path.relative_to(REPO) for path in (REPO / "weights").rglob("*") if path.is_file()}
    assert box == {path.relative_to(site / "cmmd") for path in (site / "cmmd" / "weights").rglob("*") if path.is_file()}
    metadata = (site / f"cmmd-{cmmd.__version__}.dist-info" / "METADATA").read_text()
    needs = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    needs = [line for line in needs if "extra ==" not in line]
    assert {name.split(">")[0] for name in needs} == {"torch", "numpy", "soundfile", "imageio[ffmpeg]", "safetensors"}


def test_packaging_works_beside_a_users_own_files(installed, tmp_path, weights):
    python, site, _ = installed
    for name in ("sample", "train", "vae", "data"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is the user\\'s own file')\n")
    data.write_clip(tmp_path / "in.mp4", moving_square(10, 10))
    program = f"""
import cmmd, cmmd.evaluate, cmmd.train
from cmmd.sample import sample
from cmmd.vae import VAE
assert cmmd.__file__ == {str(site / "cmmd" / "__init__.py")!r} and cmmd.__version__ == {cmmd.__version__!r}
clip = sample("in.mp4", weights={str(weights)!r}, steps=1, device="cpu")
assert type(cmmd.load({str(weights / "vae.safetensors")!r}, VAE)) is VAE
clip.save("out.mp4")
print(cmmd.sample.WEIGHTS, clip.audio.shape)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert command(python, "-c", program, cwd=tmp_path, env=env) == f"{site / 'cmmd' / 'weights'} (16000,)\n"
    assert abs(len(data.read_audio(tmp_path / "out.mp4")) - 16000) < 320
    scripts = python.parent
    for script, part in (("cmmd-sample", "--condition"), ("cmmd-train", "vocoder"), ("cmmd-evaluate", "worlds")):
        assert part in command(scripts / script, "--help", cwd=tmp_path, env=env)
    assert "--seed" in command(python, "-m", "cmmd.sample", "--help", cwd=tmp_path, env=env)
    made = command(scripts / "cmmd-sample", "in.mp4", "-o", "again.mp4", "--weights", weights, "--steps", "1",
                   cwd=tmp_path, env=env)
    assert made == "again.mp4: 1.0 s\n"


# ==== weights: what ships

shipped = pytest.mark.skipif(
    not (WORLDS / "cmmd.safetensors").exists(), reason="needs the trained weights of weights/worlds")


@pytest.fixture(scope="module")
def trained():
    return load_models("worlds", "cpu")


@shipped
def test_weights_are_small_and_have_a_card(trained):
    assert sum(path.stat().st_size for path in (REPO / "weights").rglob("*") if path.is_file()) < 36e6
    assert any("bounce" in card.read_text() for card in (REPO / "weights").rglob("README.md"))


@shipped
def test_weights_make_the_sounds_of_held_out_clips(trained, tmp_path):
    clips, waves = [bounce(700_000 + i) for i in range(8)], []
    for i, clip in enumerate(clips):
        data.write_clip(tmp_path / "in.mp4", clip.video, fps=clip.fps)
        made = sample(tmp_path / "in.mp4", models=trained, seed=i)
        assert abs(len(made.audio) - len(clip.audio)) < 320
        waves.append(made.audio[: len(clip.audio)])
    mels = true_mels([clip._replace(audio=wave) for clip, wave in zip(clips, waves)])
    found = [evaluate.onsets(mel, HOP_SECONDS) for mel in mels]
    assert evaluate.scores(evaluate.event_counts(found, [clip.times for clip in clips], 0.05).sum(0)).f1 > 0.8
    pitch = evaluate.pitch_counts(mels, found, clips, HOP_SECONDS, evaluate.pitch_templates(VocoderConfig()))
    assert evaluate.share(pitch.sum(0)) > 0.6  # chance: 0.2


@shipped
def test_weights_keep_held_out_frames_and_sounds(trained):
    clips = [bounce(700_000 + i, seconds=1.792) for i in range(8)]
    frames = train.to_frames(np.stack([clip.video for clip in clips]))
    back = trained.vae.decode(trained.vae.encode(frames))
    assert train.psnr(back.flatten(0, 1) / 2, frames.flatten(0, 1) / 2).mean() > 30
    latents = trained.vae.encode(frames)
    assert abs(latents.mean()) < 0.3 and 0.7 < latents.std() < 1.3
    waves = torch.from_numpy(np.stack([clip.audio for clip in clips]))
    mel = log_mel(waves, trained.vocoder.config)
    normal = trained.cmmd.normalise(mel)
    assert abs(normal.mean()) < 0.3 and 0.7 < normal.std() < 1.3
    ours, others = (mel_loss(x, waves, trained.vocoder.config) for x in (trained.vocoder.decode(mel), waves.roll(1, 0)))
    assert ours < 0.6 and ours < others / 2


@shipped
def test_weights_run_the_demonstration_in_the_clone(tmp_path):
    said = command(sys.executable, REPO / "sample.py", cwd=tmp_path)
    assert "impacts marked" in said and {path.name for path in tmp_path.iterdir()} == {"demo.mp4", "demo.png"}
