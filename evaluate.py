"""Measurements: scores against known events, and the speed of the whole chain.

In reading order
    matching and scores    match, Score, scores, chance, bootstrap
    onsets                 onset_flux, onsets: the detector, the same for true and for made sounds
    pitch                  pitch_templates, pitch_kind: which ball a sound belongs to
    events in pictures     picture_events: impacts of balls and beats of a dance, seen in true or made frames
    envelopes              envelope, envelope_correlation (plain and residual)
    pictures and vocoders  psnr, bicubic_baseline, vocoder_quality
    worlds                 held-out clips with known events through files, models and detector, and their pictures
    speed                  seconds by stage, and peak memory, in a fresh process per length
    command line           python evaluate.py worlds | pictures | speed

Letters: B batch, T video frames, C channels, H W latent height and width, M mel bins, L mel frames, S samples,
N clips, K kinds of ball. Times are seconds. Every figure is printed beside its chance level, its ceiling and n.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from cmmd import atomic, generate
from cmmd.data import KIND_HUE, KIND_PITCH, TEMPI, TRAINING_SEED, bounce, dance, read_video, write_clip
from cmmd.vae import to_frames, to_uint8
from cmmd.vocoder import griffin_lim, log_mel, multi_resolution_stft

# The onset detector. Tuned once on true training sounds of `bounce`, then frozen.
MEL_SHIFT, MEL_SCALE, MEL_CLAMP = 2.6, 1.3, (-1.9, 3.0)  # log10 mel -> about zero mean, unit variance
FLUX_THRESHOLD = 0.35  # mean over bins of the rise from frame to frame
FLUX_RADIUS = 5  # an onset is the largest flux within this many frames on either side
ONSET_BIAS = -0.0045  # s, the mean of (detected - true) time over 6,500 impacts of bounce seeds 5_000_000 to 5_001_999
PITCH_BEFORE, PITCH_AFTER = (-4, -1), (1, 4)  # mel frames around an onset, compared to see what newly sounds

# Events in pictures. Tuned on true frames of seeds 520_000 to 520_099 and on the same after the VAE, then frozen.
VIVID, MOVED = 0.18, 0.06  # a ball's pixels: this far from grey towards its hue, and from the median over time
SEEN = 0.002  # of the picture that a ball must fill
GRAVITY = (2.5, 5.5)  # picture heights / s^2, as `bounce` draws it
TURN, NEAR_FLOOR = 0.07, 0.1  # picture heights: a touch turns a ball by so much a frame, so near its lowest place
BALL_REST = 0.2  # s, less than any ball's time between two touches

TOLERANCES = (0.05, 0.1)  # s
TEST_SEED = 0  # first seed of the test clips; settings are chosen on validation clips, from seed 500_000 on


# ---------------------------------------------------------------- matching and scores

Score = namedtuple("Score", "f1 precision recall")


def match(a, b, tolerance):
    """Largest one-to-one set of pairs (i, j) with |a[i] - b[j]| <= tolerance; all three in seconds.

    Times become whole milliseconds first, and the window includes its edge, so that no rounding of floats decides.
    Walking both sorted lists and taking each pair as soon as it fits is a maximum matching, since all windows
    are equally wide. Counts equal those of `mir_eval.util.match_events`.
    """
    a, b = _milliseconds(a), _milliseconds(b)
    order_a, order_b, width = np.argsort(a, kind="stable"), np.argsort(b, kind="stable"), round(tolerance * 1000)
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        gap = a[order_a[i]] - b[order_b[j]]
        if abs(gap) <= width:
            pairs.append((int(order_a[i]), int(order_b[j])))
        i, j = i + (gap <= width), j + (gap >= -width)
    return pairs


def _milliseconds(times):
    return np.rint(np.asarray(times, dtype=np.float64).reshape(-1) * 1000).astype(np.int64)


def event_counts(found, true, tolerance):
    """Per clip (matched, found, true) events: lists of N arrays of times -> (N, 3)."""
    if len(found) != len(true):
        raise ValueError(f"{len(found)} clips of found events, {len(true)} of true ones: give one list per clip")
    return np.array([(len(match(f, t, tolerance)), len(f), len(t)) for f, t in zip(found, true)]).reshape(-1, 3)


def scores(counts):
    """Counts (..., 3) of (matched, found, true), pooled over clips -> Score of F1, precision, recall; 0/0 is NaN."""
    matched, found, true = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Score(2 * matched / (found + true), matched / found, matched / true)


def chance(found, true, tolerance):
    """Score of the same outputs against the events of every other clip.

    Pooling all pairs is the average of the pooled scores over the N - 1 ways to rotate the clips.
    """
    if len(found) < 2:
        raise ValueError("chance needs at least two clips")
    pairs = [(len(match(f, t, tolerance)), len(f), len(t))
             for i, f in enumerate(found) for j, t in enumerate(true) if i != j]
    return scores(np.sum(pairs, axis=0))


def bootstrap(counts, statistic, draws=2000, seed=0):
    """95 % interval of statistic(pooled counts (draws, ...)) over clips drawn with replacement; counts (N, ...)."""
    counts = np.asarray(counts)
    picks = np.random.default_rng(seed).integers(0, len(counts), (draws, len(counts)))
    values = statistic(np.stack([counts[pick].sum(0) for pick in picks]))
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (np.nan, np.nan)


# ---------------------------------------------------------------- onsets

def onset_flux(mel):
    """Mean over bins of what rises from one frame to the next: log10 mel (M, L) -> (L,), the first 0."""
    x = np.clip((np.asarray(mel, dtype=np.float64) + MEL_SHIFT) / MEL_SCALE, *MEL_CLAMP)
    return np.pad(np.maximum(np.diff(x, axis=1), 0).mean(axis=0), (1, 0))


def onsets(mel, hop_seconds):
    """Times in seconds of the onsets in a log10 mel (M, L) whose frame j is centred at (j + 1/2) * hop_seconds."""
    flux = onset_flux(mel)
    padded = np.pad(flux, FLUX_RADIUS, constant_values=-np.inf)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * FLUX_RADIUS + 1)  # (L, window)
    first = around.argmax(axis=1) == FLUX_RADIUS  # the maximum, and the first of equals
    frames = np.flatnonzero(first & (flux >= FLUX_THRESHOLD))
    return (frames + 0.5) * hop_seconds - ONSET_BIAS


# ---------------------------------------------------------------- pitch

def pitch_templates(config, pitches=KIND_PITCH):
    """What a pure tone at each pitch (Hz) looks like in linear mel, scaled to respond 1 to itself: (K, M)."""
    seconds = torch.arange(8 * config.n_fft) / config.sample_rate
    tones = torch.sin(2 * torch.pi * torch.tensor(pitches)[:, None] * seconds)  # (K, S)
    shapes = 10 ** log_mel(tones, config).double().median(dim=2).values.numpy()  # (K, S) -> (K, M)
    return shapes / (shapes ** 2).sum(axis=1, keepdims=True)


def pitch_kind(mel, onset, hop_seconds, templates):
    """The kind whose pitch gains most energy at an onset: log10 mel (M, L), time in s, templates (K, M) -> int."""
    mel = 10 ** np.asarray(mel, dtype=np.float64)
    frame, last = round((onset + ONSET_BIAS) / hop_seconds - 0.5), mel.shape[1] - 1
    before, after = (mel[:, np.clip(np.arange(frame + a, frame + b + 1), 0, last)].mean(axis=1)
                     for a, b in (PITCH_BEFORE, PITCH_AFTER))
    return int(np.argmax(templates @ np.maximum(after - before, 0)))


def pitch_counts(mels, found, clips, hop_seconds, templates, tolerance=TOLERANCES[0]):
    """Per clip (right, matched): how many matched onsets sound with the pitch of the ball they match: (N, 2)."""
    rows = []
    for mel, times, clip in zip(mels, found, clips):
        pairs = match(times, clip.times, tolerance)
        right = [pitch_kind(mel, times[i], hop_seconds, templates) == clip.kinds[j] for i, j in pairs]
        rows.append((sum(right), len(pairs)))
    return np.array(rows).reshape(-1, 2)


def share(counts):
    """Pooled (..., 2) of (right, all) -> right / all; 0/0 is NaN."""
    right, total = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return right / total


# ---------------------------------------------------------------- events in pictures

def picture_events(frames, fps, world):
    """What happens in frames uint8 (T, H, W, 3) of the world "bounce" (touches) or "dance" (beats), at 10 fps or so.

    -> times (N,) in seconds from the clip's start, sorted, and kinds (N,): of the ball, by its colour, or of the
    dancer, by the shirt's. They are read off the frames alone, true or made. ValueError for other arrays or worlds."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"expected frames uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    find = {"bounce": _touches, "dance": _beats}.get(world)
    if find is None:
        raise ValueError(f"world {world!r}: choose bounce or dance")
    times, kinds = find(frames.astype(np.float32) / 255, fps)
    order = np.argsort(times, kind="stable")
    return np.asarray(times, dtype=float)[order], np.asarray(kinds, dtype=int)[order]


def _touches(frames, fps):
    """Times and kinds of the touches of the floor.

    Between touches a ball falls freely, so the second difference of its height is the same in every frame; a touch
    between two frames adds to both theirs, the more to the nearer one: their weighted mean is its time. At the clip's
    ends, where no second difference is, the first and last two frames that fall freely are followed to the floor."""
    tracks, times, kinds = _ball_tracks(frames), [], []
    bends = np.diff(tracks, 2, axis=1)  # (K, T - 2), at frames 1 to T - 2
    falling = bends[bends > 0]
    pull = np.clip(np.median(falling) if len(falling) else 0.0, *(np.array(GRAVITY) / fps**2))  # heights / frame^2
    for kind, track in enumerate(tracks):
        if np.isfinite(track).sum() < 3:
            continue
        floor, last = np.nanpercentile(track, 95), len(track) - 1
        turns = np.maximum(np.nan_to_num(pull - bends[kind]), 0)
        strength = turns[:-1] + turns[1:]  # of a touch between frames k + 1 and k + 2
        inner = [k + 1 + turns[k + 1] / strength[k] for k in np.argsort(-strength) if strength[k] > TURN
                 and np.nanmax(track[k + 1:k + 3]) > floor - NEAR_FLOOR]
        ends = [*_first_touch(track, pull, floor), *(last - k for k in _first_touch(track[::-1], pull, floor))]
        kept = []
        for place in ends + inner:  # in frames
            if all(abs(place - other) >= BALL_REST * fps for other in kept):
                kept.append(place)
        times += [(place + 0.5) / fps for place in kept]
        kinds += [kind] * len(kept)
    return times, kinds


def _first_touch(track, pull, floor):
    """[place in frames] of a touch before frame 1, which frames 1 and 2, or 0 and 1, come up from; else []."""
    for k, most in ((1, 1.0), (0, 0.5)):
        if len(track) > k + 1 and np.isfinite(track[k:k + 2]).all():
            speed = track[k + 1] - track[k] - pull / 2  # downward at frame k
            since = (speed + np.sqrt(max(speed**2 + 2 * pull * (floor - track[k]), 0.0))) / pull
            if speed < 0 and since <= most:
                return [k - max(since, 0.0)]
    return []


def _ball_tracks(frames):
    """How far each kind of ball is below the picture's top: frames (T, H, W, 3) -> (K, T), NaN where it is not seen."""
    T, H, W, _ = frames.shape
    hue = _hue_likeness(frames)  # (T, H, W, K)
    ball = (hue.max(-1) > VIVID) & (np.abs(frames - np.median(frames, axis=0)).max(-1) > MOVED)
    of_kind = ball[..., None] & (hue.argmax(-1)[..., None] == np.arange(len(KIND_HUE)))
    rows, mass = of_kind.sum(2), of_kind.sum((1, 2))  # (T, H, K), (T, K)
    centre = np.einsum("thk,h->tk", rows, (np.arange(H) + 0.5) / H) / np.maximum(mass, 1)
    return np.where(mass >= SEEN * H * W, centre, np.nan).T


def _beats(frames, fps):
    """Times and kinds of the beats of a dance: the grid of the one tempo that best explains when the figure rests.

    What changes from the frame before to the frame after is least where the figure turns round. As with trackers of
    beats in sound, what moves without a rhythm gets a grid too; only what does not move has no beats."""
    change = np.abs(frames[2:] - frames[:-2]).mean((1, 2, 3))  # at frames 1 to T - 2
    if len(change) < 4 or np.ptp(change) < 1e-6:
        return [], []
    t, seconds = (np.arange(len(change)) + 1.5) / fps, len(frames) / fps
    tempi = np.arange(TEMPI[0] - 5, TEMPI[1] + 5, min(0.5, 1 / seconds))
    angles = 2 * np.pi * np.outer(tempi / 60, t)
    waves = np.stack([np.ones_like(angles), np.cos(angles), np.sin(angles)], 2)  # (tempi, T - 2, 3)
    fits = [np.linalg.lstsq(wave, change, rcond=None)[0] for wave in waves]
    best = np.argmin([np.square(change - wave @ fit).sum() for wave, fit in zip(waves, fits)])
    period, phase = 60 / tempi[best], np.arctan2(fits[best][2], fits[best][1]) / (2 * np.pi)
    times = np.arange((phase + 0.5) * period % period, seconds, period)
    likeness = _hue_likeness(frames).reshape(-1, len(KIND_HUE))
    shirt = likeness[np.argsort(likeness.max(1))[-len(likeness) // 100:]].sum(0)  # the most colourful hundredth
    return times, [int(shirt.argmax())] * len(times)


def _hue_likeness(frames):
    """How far each pixel (..., 3) in [0, 1] is from grey in the direction of each kind's hue -> (..., K)."""
    position = 6 * np.array(KIND_HUE)[:, None] + np.array([5.0, 3.0, 1.0])  # hue -> pure colour, (K, 3)
    hues = 1 - np.clip(np.minimum(position % 6, 4 - position % 6), 0, 1)
    hues -= hues.mean(1, keepdims=True)
    hues = (hues / np.linalg.norm(hues, axis=1, keepdims=True)).astype(np.float32)
    return (frames - frames.mean(-1, keepdims=True)) @ hues.T


# ---------------------------------------------------------------- envelopes

def envelope(mels):
    """Mean over bins of log mels (N, M, L) -> (N, L)."""
    return np.asarray(mels, dtype=np.float64).mean(axis=1)


def envelope_correlation(generated, true, training_mean=None):
    """Pearson correlation over time of envelopes (N, L), per clip (N,); NaN where one of the two is constant.

    With training_mean (L,), the training set's mean envelope of the same crop, it is the residual correlation: the
    one that counts, since clips of one format resemble each other whatever the model does.
    """
    generated, true = (np.asarray(x, dtype=np.float64) - (0 if training_mean is None else training_mean)
                       for x in (generated, true))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (generated, true))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))


# ---------------------------------------------------------------- pictures and vocoders

def psnr(a, b):
    """dB per frame between frames (..., 3, H, W) in [0, 1] -> (...)."""
    return -10 * torch.log10((a - b).square().mean(dim=(-3, -2, -1)).clamp_min(1e-10))


def bicubic_baseline(frames, factor=8):
    """Frames (T, 3, H, W) in [0, 1], made smaller by `factor` and larger again, with as much detail as is left."""
    small = torch.nn.functional.interpolate(frames, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return torch.nn.functional.interpolate(small, size=frames.shape[-2:], mode="bicubic").clamp(0, 1)


def vocoder_quality(made, true, config):
    """Waves (B, S) made from the true ones' mel, and true -> mel L1 in log10 units, multi-resolution STFT distance."""
    mel_l1 = (log_mel(made, config) - log_mel(true, config)).abs().mean()
    distances = [multi_resolution_stft(*pair).mean(0, keepdim=True) for pair in zip(made.split(1), true.split(1))]
    return {"mel_l1": float(mel_l1), "stft": float(torch.cat(distances).mean())}


# FVD, KVD, FAD, beats, AV-Align and the user study come here.


# ---------------------------------------------------------------- worlds

def through_video_file(clip, folder):
    """The clip's frames (T, H, W, 3) uint8 as a viewer gets them: written to an mp4 file and read back."""
    path = Path(folder) / "clip.mp4"
    write_clip(path, clip.video, fps=clip.fps)
    return read_video(path, fps=clip.fps, size=clip.video.shape[1])


def through_wav_file(waves, sample_rate, folder):
    """Waves (B, S) in [-1, 1] as a listener gets them: written to 16-bit wav files and read back."""
    import soundfile
    path, back = Path(folder) / "clip.wav", []
    for wave in waves:
        write_clip(path, audio=wave.numpy(), sample_rate=sample_rate)
        back.append(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
    return torch.stack(back)


def batches(items, size):
    """Slices of `items`, `size` long; the last may be shorter."""
    return (items[i:i + size] for i in range(0, len(items), size))


def sound_scores(mels, clips, config):
    """Of log10 mels (N, M, L) made for N world clips: onset F1 at 50 and 100 ms, share of matched onsets in pitch."""
    hop = config.hop / config.sample_rate
    found, true = [onsets(mel, hop) for mel in mels], [clip.times for clip in clips]
    figures = {f"f1_{round(tol * 1000)}": float(scores(event_counts(found, true, tol).sum(0)).f1) for tol in TOLERANCES}
    return figures | {"pitch": float(share(pitch_counts(mels, found, clips, hop, pitch_templates(config)).sum(0)))}


def event_row(found, true):
    """F1, precision, recall, interval and chance at each tolerance, of lists of N arrays of times -> dict."""
    row = {}
    for tolerance in TOLERANCES:
        counts, ms = event_counts(found, true, tolerance), round(tolerance * 1000)
        for key, value in scores(counts.sum(0))._asdict().items():
            row[f"{key}_{ms}"] = float(value)
        row[f"interval_{ms}"] = bootstrap(counts, lambda pooled: scores(pooled).f1)
        row[f"chance_{ms}"] = float(chance(found, true, tolerance).f1)
    return row


class Worlds:
    """Held-out clips of `bounce`, encoded once; every way to make their sound is scored by the same `row`."""

    def __init__(self, models, seeds, seconds, batch, folder):
        self.models, self.seeds, self.batch, self.folder = models, seeds, batch, folder
        self.device = next(models.cmmd.parameters()).device
        self.clips = [bounce(seed, seconds=seconds) for seed in seeds]
        self.config = models.vocoder.config
        self.hop_seconds = self.config.hop / self.config.sample_rate
        self.true = torch.from_numpy(np.stack([clip.audio for clip in self.clips]))  # (N, S)
        self.templates = pitch_templates(self.config)
        self.encode()

    @torch.no_grad()
    def encode(self):
        """Video files -> latents (N, T, C, H, W) on the CPU, and PSNR per frame of the VAE and of the baseline."""
        latents, own, bicubic = [], [], []
        for clips in batches(self.clips, self.batch):
            frames = to_frames(np.stack([through_video_file(clip, self.folder) for clip in clips]))
            latents.append(self.models.vae.encode(frames.to(self.device)).cpu())
            back = self.models.vae.decode(latents[-1].to(self.device)).cpu().clamp(-1, 1)
            true = (frames.flatten(0, 1) + 1) / 2  # (B, T, 3, H, W) -> (B*T, 3, H, W) in [0, 1]
            own.append(psnr((back.flatten(0, 1) + 1) / 2, true))
            bicubic.append(psnr(bicubic_baseline(true), true))
        self.latents = torch.cat(latents)
        self.psnr, self.psnr_bicubic = float(torch.cat(own).mean()), float(torch.cat(bicubic).mean())

    def padded_mel(self):
        """The true sounds' log mel (N, M, L), with as many frames as the model makes for the clip."""
        return log_mel(torch.nn.functional.pad(self.true, (0, -self.true.shape[1] % self.config.hop)), self.config)

    @torch.no_grad()
    def vocode(self, mel):
        """Log mel (N, M, L) -> waves (N, S) of the clips' exact length, through 16-bit wav files."""
        waves = [self.models.vocoder.decode(part.to(self.device)).cpu() for part in batches(mel, self.batch)]
        return through_wav_file(torch.cat(waves)[:, :self.true.shape[1]], self.config.sample_rate, self.folder)

    def generate(self, **settings):
        """The model's waves (N, S) for the clips' video; settings go to `cmmd.generate`."""
        mels = []
        for part, seeds in zip(batches(self.latents, self.batch), batches(self.seeds, self.batch)):
            mel = generate(self.models.cmmd, video=part.to(self.device), seeds=tuple(seeds), **settings)[1]
            mels.append(self.models.cmmd.denormalise(mel).detach().float().cpu())
        return self.vocode(torch.cat(mels))

    def row(self, name, waves):
        """Scores of the sounds (N, S) against the true impacts: one dict, a line of the table."""
        mels = log_mel(waves, self.config).numpy()
        found, true = [onsets(mel, self.hop_seconds) for mel in mels], [clip.times for clip in self.clips]
        row = {"sound": name} | event_row(found, true)
        counts = pitch_counts(mels, found, self.clips, self.hop_seconds, self.templates)
        row.update(pitch=float(share(counts.sum(0))), pitch_interval=bootstrap(counts, share))
        return row | {"pitch_n": int(counts[:, 1].sum()), "onsets": [times.round(4).tolist() for times in found]}

    def quality(self):
        """PSNR of the VAE beside bicubic, and the vocoder on the true sounds beside Griffin-Lim."""
        mel, length = self.padded_mel(), self.true.shape[1]
        slow = torch.cat([griffin_lim(part, self.config) for part in batches(mel, self.batch)])[:, :length]
        return {"vae_psnr": self.psnr, "bicubic_psnr": self.psnr_bicubic,
                "vocoder": vocoder_quality(self.vocode(mel), self.true, self.config),
                "griffin_lim": vocoder_quality(slow, self.true, self.config)}


def worlds(args):
    """The command `worlds`: print, and with --out write, the table over held-out clips."""
    check_out(args.out)
    check_seeds(args)
    from cmmd.sample import load_models
    models = load_models(args.weights, args.device)
    settings = {key: getattr(args, key) for key in ("steps", "guidance", "stochasticity", "sampler")
                if getattr(args, key) is not None}
    with tempfile.TemporaryDirectory() as folder:
        world = Worlds(models, range(args.seed_start, args.seed_start + args.n), args.seconds, args.batch, folder)
        rows = [world.row("true (raw ceiling)", world.true),
                world.row("true, through mel and vocoder (chain ceiling)", world.vocode(world.padded_mel()))]
        for condition in args.condition:
            start = time.perf_counter()
            rows.append(world.row(condition, world.generate(condition=condition, **settings)))
            print(f"{condition}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        result = {"n": args.n, "seeds": [args.seed_start, args.seed_start + args.n - 1], "seconds": args.seconds,
                  "weights": args.weights, "settings": settings, "machine": machine(), "rows": rows, **world.quality()}
    print(worlds_table(result))
    if args.out:
        write_result(args.out, result)


@torch.no_grad()
def pictures(args):
    """The command `pictures`: print, and with --out write, how well `picture_events` reads the frames of true clips."""
    check_out(args.out)
    check_seeds(args)
    from cmmd.sample import load_models
    vae, rows = load_models(args.weights, args.device).vae, []
    device = next(vae.parameters()).device
    for world in (bounce, dance):
        clips = [world(seed, seconds=args.seconds) for seed in range(args.seed_start, args.seed_start + args.n)]
        true = [clip.video for clip in clips]
        coded = [to_uint8(vae.decode(vae.encode(to_frames(video[None]).to(device))))[0] for video in true]
        rows += [picture_row(f"{world.__name__}, {name}", videos, clips, world.__name__)
                 for name, videos in (("true", true), ("through the VAE", coded))]
    last = args.seed_start + args.n - 1
    print("\n".join([*event_table(rows, "pictures", "kind"), "", f"n = {args.n} clips of {args.seconds} s, seeds "
                     f"{args.seed_start} to {last}; VAE of {args.weights}; {machine()}."]))
    if args.out:
        write_result(args.out, {"n": args.n, "seeds": [args.seed_start, last], "seconds": args.seconds,
                                "weights": args.weights, "machine": machine(), "rows": rows})


def picture_row(name, videos, clips, world):
    """Scores of the events seen in N videos (T, H, W, 3) against those of N clips: one dict, a line of the table."""
    found, right = [picture_events(video, clip.fps, world) for video, clip in zip(videos, clips)], []
    for (times, kinds), clip in zip(found, clips):
        pairs = match(times, clip.times, TOLERANCES[0])
        right.append((sum(kinds[i] == clip.kinds[j] for i, j in pairs), len(pairs)))
    row = {"pictures": name} | event_row([times for times, _ in found], [clip.times for clip in clips])
    return row | {"kind": float(share(np.sum(right, 0))), "kind_interval": bootstrap(right, share)}


def event_table(rows, what, right):
    """The lines of a markdown table of `event_row`s: `what` is shown, and of the matched ones `right` is right."""
    head = f"| {what} | F1 ±50 ms [95 %] | chance | F1 ±100 ms [95 %] | chance | {right} right [95 %] |"
    lines = [head, "|---" * 6 + "|"]
    span = lambda value, interval: f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    for row in rows:
        cells = [f"{span(row[f'f1_{ms}'], row[f'interval_{ms}'])} | {row[f'chance_{ms}']:.3f}" for ms in (50, 100)]
        lines.append(f"| {row[what]} | {' | '.join(cells)} | {span(row[right], row[f'{right}_interval'])} |")
    return lines


def worlds_table(result):
    """The markdown table, and the lines below it."""
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    vocoder, slow = result["vocoder"], result["griffin_lim"]
    first, last = result["seeds"]
    return "\n".join(event_table(result["rows"], "sound", "pitch") + [
        "", f"n = {result['n']} clips of {result['seconds']} s, seeds {first} to {last}; weights {result['weights']}; "
        f"{settings}; pitch: of the onsets matched within ±50 ms, chance 0.2; {result['machine']}.",
        f"VAE PSNR {result['vae_psnr']:.2f} dB (8 x bicubic {result['bicubic_psnr']:.2f} dB). "
        f"Vocoder mel L1 {vocoder['mel_l1']:.3f} (Griffin-Lim {slow['mel_l1']:.3f}), "
        f"STFT distance {vocoder['stft']:.3f} ({slow['stft']:.3f})."])


def machine():
    """One line on what the figures were measured with."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def check_out(path):
    """Refuse, before any work, an --out that `write_result` could not write."""
    if path and Path(path).suffix not in (".json", ".csv"):
        raise ValueError(f"--out {path}: the name must end in .json or .csv")


def check_seeds(args):
    """Refuse too few clips, and those that trainings draw."""
    if args.n < 2:
        raise ValueError(f"--n {args.n}: chance needs the events of other clips, take at least 2")
    if args.seed_start + args.n > TRAINING_SEED:
        raise ValueError(f"seeds up to {args.seed_start + args.n - 1}: those from {TRAINING_SEED} on are trained on")


def write_result(path, result):
    """Everything as .json, or the rows as .csv."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        if Path(path).suffix == ".json":
            json.dump(result, file, indent=1)
        else:
            table = csv.DictWriter(file, result["rows"][0])
            table.writeheader()
            table.writerows(result["rows"])


# ---------------------------------------------------------------- speed

def speed(args):
    """The command `speed`: a markdown table, each length in a fresh process."""
    if args.child:
        return print(json.dumps(timed_sample(args)))
    check_out(args.out)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in args.seconds:
            path, clip = Path(folder) / f"{seconds:g}.mp4", bounce(TEST_SEED, seconds=seconds)
            write_clip(path, clip.video, fps=clip.fps)
            command = [sys.executable, __file__, "speed", "--child", str(path), "--steps", str(args.steps)]
            command += ["--weights", args.weights] + (["--device", args.device] if args.device else [])
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if child.returncode:
                raise ValueError(f"the process that sampled {seconds:g} s of video ended with {child.returncode}")
            rows.append({"seconds": seconds, **json.loads(child.stdout)})
    print(speed_table(rows, args))
    if args.out:
        write_result(args.out, {"weights": args.weights, "steps": args.steps, "machine": machine(), "rows": rows})


def timed_sample(args):
    """Seconds by stage of `sample` on the video file args.child, weights loaded before, and peak memory in MiB.

    It is `sample` itself that runs, with a stopwatch around what it calls; "other" is what lies between."""
    from cmmd import sample as door
    spent = dict.fromkeys(("read", "encode", "generate", "decode", "write"), 0.0)

    def timed(stage, function):
        def call(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[stage] += time.perf_counter() - start
        return call

    models = door.load_models(args.weights, args.device)
    models.vae.encode = timed("encode", models.vae.encode)
    models.vocoder.decode = timed("decode", models.vocoder.decode)
    door.generate, door._video_input = timed("generate", door.generate), timed("read", door._video_input)
    start = time.perf_counter()
    clip = door.sample(args.child, steps=args.steps, models=models)
    timed("write", clip.save)(Path(args.child).with_suffix(".out.mp4"))
    total = time.perf_counter() - start
    spent["read"] -= spent["encode"]  # frames are encoded while they are read
    return {**spent, "other": total - sum(spent.values()), "total": total, "peak_mib": peak_memory()}


def peak_memory():
    """This process's largest resident memory in MiB, without its ffmpeg children.

    Linux's VmHWM, because getrusage there also counts what the parent held when it started this process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 1024)


def speed_table(rows, args):
    """One line per length, in seconds."""
    stages = [key for key in rows[0] if key not in ("seconds", "peak_mib")]
    lines = [f"| video | {' | '.join(stages)} | per second of video | peak memory |", "|---" * (len(stages) + 3) + "|"]
    for row in rows:
        cells = [f"{row[stage]:.2f}" for stage in stages] + [f"{row['total'] / row['seconds']:.3f}"]
        lines.append(f"| {row['seconds']:g} s | {' | '.join(cells)} | {row['peak_mib']:.0f} MiB |")
    return "\n".join(lines + ["", "Seconds, after import and loading, one fresh process per length; "
                              f"weights {args.weights}, {args.steps} steps; {machine()}."])


# ---------------------------------------------------------------- command line

def main(argv=None):
    """The command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("worlds", help="held-out bounce clips through the whole chain, against the true impacts")
    three = commands.add_parser("pictures", help="how well impacts and beats are read off held-out clips' pictures")
    for command in (one, three):
        command.add_argument("--n", type=int, default=200, help="clips (default: %(default)s)")
        command.add_argument("--seed-start", type=int, default=TEST_SEED,
                             help="seed of the first clip (default: %(default)s)")
        command.add_argument("--seconds", type=float, default=1.8, help="length of a clip (default: %(default)s)")
    ways = ["clean", "replace", "guide"]
    one.add_argument("--condition", nargs="*", default=ways, choices=ways, help="(default: all three)")
    one.add_argument("--guidance", type=float)
    one.add_argument("--stochasticity", type=float)
    one.add_argument("--sampler", choices=["ddim", "dpm"])
    one.add_argument("--batch", type=int, default=16)
    two = commands.add_parser("speed", help="seconds by stage and peak memory of sampling sound for a video file")
    two.add_argument("--seconds", type=float, nargs="+", default=[10, 100, 600], help="lengths (default: %(default)s)")
    two.add_argument("--child", help=argparse.SUPPRESS)  # the file to time, in the fresh process
    for command in (one, two):
        command.add_argument("--steps", type=int, default=6, help="sampler steps (default: %(default)s)")
    for command in (one, two, three):
        command.add_argument("--weights", default="worlds", help="name in the box, or folder (default: %(default)s)")
        command.add_argument("--device")
        command.add_argument("--out", help="also write everything to this .json, or the rows to this .csv")
    args = parser.parse_args(argv)
    try:
        {"worlds": worlds, "pictures": pictures, "speed": speed}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
