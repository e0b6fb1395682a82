"""Measurements: scores against known events, and the speed of the whole chain.

In reading order
    matching and scores    match, scores of counts, bootstrap
    onsets and pitch       onsets: the detector, the same for true and for made sounds; impacts: which ball sounds when
    events in pictures     picture_events: impacts of balls and beats of a dance, seen in true or made frames
    curves and quality     envelope_correlation (plain and residual), psnr, bicubic_baseline, vocoder_quality
    heard and seen         rhythm, motion, av_align, hear: all that is measured of one clip
    scores of pairs        measures: every score of clips (Table 2); pair_rows: with interval, chance and ceiling
    distances between sets frechet, kernel_distance; video_rows (Table 1), audio_distances
    worlds                 held-out clips with known events in every direction: what is made, heard and seen; variety
    right and wrong pairs  pairs: the loss of true, shifted and swapped sounds by noise level, and retrieval
    folders of clips       match_folders, listen, folders: clips of any model against the true ones
    figures                the paper's Fig. 2 and 4; how Eq. 6 trained, frames of clips, F1 by steps
    the user study         study_make: the rating page; study_read: MOS, Fig. 5, signed_rank, holm
    vocoder                how near to true sounds vocoders come, over folders of files, beside Griffin-Lim
    speed                  seconds by stage, and peak memory, in a fresh process per length
    ports                  our VAE, vocoder and mel beside the originals: time and memory
    bench                  the model's passes and training steps beside MM-Diffusion's: time, FLOPs, memory
    command line           python evaluate.py worlds | compare | pairs | folders ... (--help)

Letters: B batch, T video frames, C channels, H W latent height and width, M mel bins, L mel frames, S samples,
N clips, K kinds of ball. Times are seconds. Every score of clips is printed beside its chance level, its ceiling and n.
"""

import base64
import colorsys
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter, namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from cmmd import (
    CMMD, CONDITIONS, SIZES, CMMDConfig, Parser, atomic, check_sampling, contrastive_loss, fast_autocast, first_line,
    generate, joint_loss, json_object, levels, number, sample as door, usable_device, whole_mel_frames)
from cmmd.data import (
    KIND_HUE, KIND_PITCH, SOUND_TYPES, TEMPI, TRAINING_SEED, VIDEO_TYPES, WORLDS, bounce, check_output,
    find_sources, probe, read_audio, read_video, share_of, write_clip)
from cmmd.sample import load_models
from cmmd.vae import VAE, load as load_vae, to_frames, to_uint8
from cmmd.vocoder import (
    Vocoder, VocoderConfig, fold_weight_norm, griffin_lim, load as load_vocoder, log_mel, multi_resolution_stft,
    published_names)

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


# ---------------------------------------------------------------- tables and results

def table(columns, rows, *below):
    """A markdown table of rows (dicts), and the lines below it. columns: {heading: format of a row's cell}."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    lines = [line([cell.format_map(row) for cell in columns.values()]) for row in rows]
    return "\n".join([line(columns), "|---" * len(columns) + "|", *lines, *([""] if below else []), *below])


def machine(device=None):
    """One line on what the figures were measured with: a GPU where `device`, by default any there is, is one."""
    gpu = torch.cuda.is_available() and torch.device(device or "cuda").type == "cuda"
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_result(path, result):
    """Everything as .json, or the rows as .csv."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if Path(path).suffix.lower() == ".json":
            plain = json.loads(json.dumps(result), parse_constant=lambda name: None)  # null for NaN and infinity
            json.dump(plain, file, indent=1, allow_nan=False)
        else:
            rows = csv.DictWriter(file, dict.fromkeys(key for row in result["rows"] for key in row))
            rows.writeheader()
            rows.writerows(result["rows"])


def read_result(path):
    """What `write_result` wrote as .json. ValueError for any other file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give a result that --out wrote") from None
    rows = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: has no rows; give a result that --out wrote")
    return result


# ---------------------------------------------------------------- matching and scores

Score = namedtuple("Score", "f1 precision recall")
Events = namedtuple("Events", "times kinds")  # (N,) each, of one clip


def match(a, b, tolerance):
    """Largest one-to-one set of pairs (i, j) with |a[i] - b[j]| <= tolerance; all three in seconds.

    Times become whole milliseconds first, and the window includes its edge, so that no rounding of floats decides.
    Walking both sorted lists and taking each pair as soon as it fits is a maximum matching, since all windows
    are equally wide. Counts equal those of `mir_eval.util.match_events`."""
    a, b = (np.rint(np.asarray(x, dtype=np.float64).reshape(-1) * 1000).astype(np.int64) for x in (a, b))
    order_a, order_b, width = np.argsort(a, kind="stable"), np.argsort(b, kind="stable"), round(tolerance * 1000)
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        gap = a[order_a[i]] - b[order_b[j]]
        if abs(gap) <= width:
            pairs.append((int(order_a[i]), int(order_b[j])))
        i, j = i + (gap <= width), j + (gap >= -width)
    return pairs


def event_counts(found, true, tolerance):
    """Per clip (matched, found, true) events: lists of N arrays of times -> (N, 3)."""
    if len(found) != len(true):
        raise ValueError(f"{len(found)} clips of found events, {len(true)} of true ones: give one list per clip")
    return np.array([(len(match(f, t, tolerance)), len(f), len(t)) for f, t in zip(found, true)]).reshape(-1, 3)


def kind_counts(found, true):
    """Of the Events of one clip (right, matched): how many of those matched within 50 ms are of the right kind."""
    pairs = match(found.times, true.times, TOLERANCES[0])
    return sum(int(found.kinds[i] == true.kinds[j]) for i, j in pairs), len(pairs)


def scores(counts):
    """Counts (..., 3) of (matched, found, true), pooled over clips -> Score of F1, precision, recall; 0/0 is NaN."""
    matched, found, true = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Score(2 * matched / (found + true), matched / found, matched / true)


def share(counts):
    """Pooled (..., 2) of (right, all) -> right / all; NaN where all is 0."""
    right, total = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    return np.divide(right, total, out=np.full_like(total, np.nan), where=total != 0)


def bootstrap(counts, statistic):
    """95 % interval of statistic(pooled counts (2000, ...)) over clips drawn with replacement; counts (N, ...)."""
    counts = np.asarray(counts)
    picks = np.random.default_rng(0).integers(0, len(counts), (2000, len(counts)))
    values = statistic(np.stack([counts[pick].sum(0) for pick in picks]))
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (np.nan, np.nan)


# ---------------------------------------------------------------- onsets and pitch

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


def pitch_templates(config):
    """What a pure tone at each of KIND_PITCH looks like in linear mel, scaled to respond 1 to itself: (K, M)."""
    seconds = torch.arange(8 * config.n_fft) / config.sample_rate
    tones = torch.sin(2 * torch.pi * torch.tensor(KIND_PITCH)[:, None] * seconds)  # (K, S)
    shapes = 10 ** log_mel(tones, config).double().median(dim=2).values.numpy()  # (K, S) -> (K, M)
    return shapes / (shapes ** 2).sum(axis=1, keepdims=True)


def pitch_kind(mel, onset, hop_seconds, templates):
    """The kind whose pitch gains most energy at an onset: log10 mel (M, L), time in s, templates (K, M) -> int."""
    mel = 10 ** np.asarray(mel, dtype=np.float64)
    frame, last = round((onset + ONSET_BIAS) / hop_seconds - 0.5), mel.shape[1] - 1
    before, after = (mel[:, np.clip(np.arange(frame + a, frame + b + 1), 0, last)].mean(axis=1)
                     for a, b in (PITCH_BEFORE, PITCH_AFTER))
    return int(np.argmax(templates @ np.maximum(after - before, 0)))


def impacts(mels, config):
    """What is heard in log10 mels (N, M, L) -> Events of each: the onsets, and whose pitch they have."""
    hop, templates = config.hop / config.sample_rate, pitch_templates(config)
    times = [onsets(mel, hop) for mel in mels]
    return [Events(found, [pitch_kind(mel, time, hop, templates) for time in found]) for mel, found in zip(mels, times)]


def sound_scores(mels, clips, config):
    """Log10 mels (N, M, L) made for N world clips -> onset F1 at 50 and 100 ms, and the share of right pitches."""
    found, true = impacts(mels, config), [clip.times for clip in clips]
    counts = {tol: event_counts([events.times for events in found], true, tol) for tol in TOLERANCES}
    figures = {f"f1_{round(tol * 1000)}": float(scores(each.sum(0)).f1) for tol, each in counts.items()}
    return figures | {"pitch": float(share(sum_of([*map(kind_counts, found, clips)])))}


# ---------------------------------------------------------------- events in pictures

def picture_events(frames, fps, world):
    """What happens in frames uint8 (T, H, W, 3) of the world "bounce" (touches) or "dance" (beats), at 10 fps or so.

    -> Events: times (N,) in seconds from the clip's start, sorted, and kinds (N,): of the ball, by its colour, or of
    the dancer, by the shirt's, read off the frames alone, true or made. ValueError for other arrays or worlds."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"expected frames uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    find = {"bounce": _touches, "dance": _beats}.get(world)
    if find is None:
        raise ValueError(f"world {world!r}: choose bounce or dance")
    times, kinds = find(frames.astype(np.float32) / 255, fps)
    order = np.argsort(times, kind="stable")
    return Events(np.asarray(times, dtype=float)[order], np.asarray(kinds, dtype=int)[order])


def _touches(frames, fps):
    """Times and kinds of the touches of the floor.

    Between touches a ball falls freely, so the second difference of its height is the same in every frame; a touch
    between two frames adds to both theirs, the more to the nearer one: their weighted mean is its time. At the clip's
    ends, where no second difference is, the first and last two frames that fall freely are followed to the floor."""
    tracks, times, kinds = balls(frames)[0], [], []
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


def balls(frames):
    """How far each kind of ball is below the picture's top, and its radius as what moves shows of it: frames
    (T, H, W, 3) -> two arrays (K, T), in picture heights, NaN where it is not seen."""
    T, H, W, _ = frames.shape
    hue = _hue_likeness(frames)  # (T, H, W, K)
    ball = (hue.max(-1) > VIVID) & (np.abs(frames - np.median(frames, axis=0)).max(-1) > MOVED)
    of_kind = ball[..., None] & (hue.argmax(-1)[..., None] == np.arange(len(KIND_HUE)))
    rows, mass = of_kind.sum(2), of_kind.sum((1, 2))  # (T, H, K), (T, K)
    centre = np.einsum("thk,h->tk", rows, (np.arange(H) + 0.5) / H) / np.maximum(mass, 1)
    seen = mass >= SEEN * H * W
    return np.where(seen, centre, np.nan).T, np.where(seen, np.sqrt(mass / (np.pi * H * W)), np.nan).T


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
    hues = np.array([colorsys.hsv_to_rgb(hue, 1, 1) for hue in KIND_HUE])  # (K, 3)
    hues -= hues.mean(1, keepdims=True)
    hues = (hues / np.linalg.norm(hues, axis=1, keepdims=True)).astype(np.float32)
    return (frames - frames.mean(-1, keepdims=True)) @ hues.T


# ---------------------------------------------------------------- curves, pictures and vocoders

def envelope(mels):
    """Mean over bins of log mels (N, M, L) -> (N, L)."""
    return np.asarray(mels, dtype=np.float64).mean(axis=1)


def envelope_correlation(generated, true, training_mean=0.0):
    """Pearson correlation over time of envelopes (N, L), per clip (N,); NaN where one of the two is constant.

    With training_mean (L,), the training set's mean envelope of the same crop, it is the residual correlation: the
    one that counts, since clips of one format resemble each other whatever the model does."""
    a, b = (np.asarray(x, dtype=np.float64) - training_mean for x in (generated, true))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))


def psnr(a, b):
    """dB per frame between frames (..., 3, H, W) in [0, 1] -> (...)."""
    return -10 * torch.log10((a - b).square().mean(dim=(-3, -2, -1)).clamp_min(1e-10))


def bicubic_baseline(frames):
    """Frames (T, 3, H, W) in [0, 1], made smaller 8 times and larger again, with as much detail as is left."""
    small = torch.nn.functional.interpolate(frames, scale_factor=1 / 8, mode="bicubic", antialias=True)
    return torch.nn.functional.interpolate(small, size=frames.shape[-2:], mode="bicubic").clamp(0, 1)


def vocoder_quality(made, true, config):
    """Waves (B, S) made from the true ones' mel, and true -> mel L1 in log10 units, multi-resolution STFT distance."""
    mel_l1 = (log_mel(made, config) - log_mel(true, config)).abs().mean()
    distances = [multi_resolution_stft(*pair).mean(0, keepdim=True) for pair in zip(made.split(1), true.split(1))]
    return {"mel_l1": float(mel_l1), "stft": float(torch.cat(distances).mean())}


# ---------------------------------------------------------------- what is heard and seen in a clip

FPS = 10
MUSIC_RATE = 22050  # Hz, librosa's default, which the beat tracker's settings are made for
BEAT_SECONDS = 3.6  # s; on less the tracker errs by up to 254 ms even on a click track
STILL = 0.1  # px, mean flow below which nothing moves
SAME_LENGTH = 0.1  # s by which a clip and its truth may differ

# Of one clip: onset times (s), envelope (L,), beat times, seconds that hold an onset, times of AV-Align's peaks in
# sound and picture, embeddings (n, D), movement (T - 1,), the envelope to be expected, the level above which there is
# activity, the movement to be expected. Where there is none, a string says why.
Heard = namedtuple("Heard", "onsets envelope beats bins sound_peaks motion_peaks embedding movement typical level "
                            "usual", defaults=("not measured",) * 7 + ("no picture", 0, 0, 0))
Pair = namedtuple("Pair", "name generated reference")  # paths of K draws and of the truth


def extra(name):
    """Import a package of the `eval` extra, or say in one line what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"cv2": "opencv-python-headless"}.get(name, name.partition(".")[0])
        raise ImportError(f"{package} is not installed: pip install {package}") from None


def rhythm(wave, rate=16000):
    """Wave (S,) -> librosa's beats (s), the seconds that hold an onset, onsets as AV-Align takes them (s)."""
    try:
        librosa = extra("librosa")
    except ImportError as error:
        return (str(error),) * 3
    y = librosa.resample(wave, orig_sr=rate, target_sr=MUSIC_RATE)
    beats = "shorter than 3.6 s"
    if len(wave) >= (BEAT_SECONDS - 0.05) * rate:
        beats = librosa.beat.beat_track(y=y, sr=MUSIC_RATE, units="time")[1]
    strength = librosa.onset.onset_strength(y=y, sr=MUSIC_RATE)
    detect = functools.partial(librosa.onset.onset_detect, onset_envelope=strength, sr=MUSIC_RATE, units="time")
    bins = np.unique(detect(wait=1, delta=0.2, pre_avg=1, post_avg=1, post_max=1).astype(int))
    return beats, bins, detect()


def motion(path, seconds=None):
    """Times (s) at which the mean optical flow of a file's picture peaks; a string where there is no telling."""
    try:
        cv2 = extra("cv2")
        video = read_video(path, fps=FPS, size=128, seconds=seconds)
    except (ImportError, ValueError) as error:
        return str(error)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    flows = (cv2.calcOpticalFlowFarneback(*pair, None, 0.5, 3, 15, 3, 5, 1.2, 0) for pair in zip(grey, grey[1:]))
    return flow_peaks([float(np.linalg.norm(flow, axis=2).mean()) for flow in flows]) / FPS


def common_rate(paths):
    """The lowest of the files' frame rates, at most 25: what shows fewer frames would seem to stand still between."""
    rates = [25]
    for path in paths:
        with contextlib.suppress(ValueError):  # it will be named where it is read
            rates.append(probe(path).fps or 25)
    return min(rates)


@torch.no_grad()
def movement(path, fps, seconds=None, vae=None):
    """`lower_movement` of a file's picture, through `vae` if given -> (T - 1,); a string where there is no picture."""
    try:
        video = read_video(path, fps, size=64, seconds=seconds)
    except ValueError as error:
        return str(error)
    return lower_movement(to_uint8(vae.decode(vae.encode(to_frames(video[None]))))[0] if vae else video)


def lower_movement(frames):
    """Frames uint8 (..., T, H, W, 3) -> mean change from frame to frame where a speaker's mouth is (..., T - 1)."""
    H, W = frames.shape[-3:-1]
    part = frames[..., H // 2 :, W // 4 : W - W // 4, :].astype(np.float64)
    return np.abs(np.diff(part, axis=-4)).mean(axis=(-3, -2, -1))


def flow_peaks(flow):
    """Frames at which the flow from the frame before, (T - 1,) in px, is larger than on either side."""
    flow = np.array([*flow[:1], *flow])
    middle = flow[1:-1]
    return 1 + np.flatnonzero((flow[:-2] < middle) & (middle > flow[2:]) & (middle >= STILL))


def av_align(sound, picture):
    """TempoTokens' intersection over union of peak times (s): a sound takes the first free peak nearer than a frame."""
    free = list(picture)
    for time in sound:
        near = next((peak for peak in free if abs(time - peak) < 1 / FPS - 1e-9), None)
        if near is not None:
            free.remove(near)
    union = len(sound) + len(free)
    return (len(picture) - len(free)) / union if union else "no peaks at all"


def hear(wave, config, picture="no picture", embedding=()):
    """All that is measured of one sound (S,) at config.sample_rate -> Heard."""
    wave = np.pad(wave, (0, max(0, config.n_fft - len(wave))))
    mel = log_mel(torch.from_numpy(wave)[None], config)[0].numpy()
    return Heard(onsets(mel, config.hop / config.sample_rate), mel.mean(axis=0, dtype=np.float64),
                 *rhythm(wave, config.sample_rate), picture, embedding)


# ---------------------------------------------------------------- scores of pairs

# rows {name: statistic of pooled counts}; what of the output and of the truth they need; count: (output, truth) ->
# counts, or a string that says why there are none. A sound is compared with its own clip's picture, not the truth's.
Measure = namedtuple("Measure", "rows needs count")
TABLE_2 = {"beat hit rate ±100 ms": "0.45 / 0.44 / 0.41", "beat hit rate ±500 ms": "0.89 / 0.91 / 0.89"}


def beat_counts(made, true, tolerance):
    """(hit rate, 1, matched, found, true): the first two average over clips, the others pool."""
    if not len(true.beats):
        return "no beat in the reference"
    matched = len(match(made.beats, true.beats, tolerance))
    return matched / len(true.beats), 1, matched, len(made.beats), len(true.beats)


def align_counts(made, true):
    """(AV-Align of the made sound with its picture, 1), or why there is none."""
    value = av_align(made.sound_peaks, true.motion_peaks)
    return value if isinstance(value, str) else (value, 1)


def curve_counts(made, true, usual=0.0, constant="constant loudness"):
    """(correlation over time of two curves (n,), as far as all go, less what is usual, 1), or why there is none."""
    n = min(len(x) for x in (made, true, usual) if np.ndim(x))
    if n < 3 or not np.ptp(made[:n]) or not np.ptp(true[:n]):  # two points always correlate by 1
        return constant
    value = envelope_correlation(made[None, :n], true[None, :n], usual[:n] if np.ndim(usual) else usual)[0]
    return constant if np.isnan(value) else (value, 1)


def active_counts(made, true):
    """(frames loud in both, in the made sound, in the true one): above the median level."""
    made, true = made.envelope > true.level, true.envelope > true.level
    return (made & true).sum(), made.sum(), true.sum()


def time_measures(what, needs, parts=("F1", "precision", "recall")):
    """Scores of the times `needs`, in seconds."""
    for s in TOLERANCES:
        rows = {f"{what}{part} ±{1000 * s:.0f} ms": lambda c, part=part.lower(): getattr(scores(c), part)
                for part in parts}
        count = lambda a, b, s=s: event_counts([getattr(a, needs)], [getattr(b, needs)], s)[0]
        yield Measure(rows, (needs,) * 2, count)


def world_measures():
    """Every score of the Events of worlds."""
    yield from time_measures("", "times", ["F1"])
    yield Measure({"kind right": share}, ("kinds",) * 2, kind_counts)


def measures():
    """Every score of what is `Heard` in folders of clips, in the order of the table."""
    beat, envelopes = (("beats",) * 2, ("envelope",) * 2)
    yield from time_measures("onset ", "onsets")
    for ms in (100, 500):
        yield Measure({f"beat hit rate ±{ms} ms": lambda c: share(c[..., :2]),
                       f"beat precision ±{ms} ms": lambda c: scores(c[..., 2:]).precision,
                       f"beat F1 ±{ms} ms": lambda c: scores(c[..., 2:]).f1},
                      beat, functools.partial(beat_counts, tolerance=ms / 1000))
    yield Measure({"beats, generated ÷ true": lambda c: share(c[..., 3:])}, beat, lambda a, b: beat_counts(a, b, 0.1))
    yield Measure({"CDCD beat coverage": lambda c: share(c[..., 1:]), "CDCD beat hit": lambda c: share(c[..., ::2])},
                  ("bins",) * 2, lambda a, b: (len(np.intersect1d(a.bins, b.bins)), len(a.bins), len(b.bins)))
    yield Measure({"AV-Align": share}, ("sound_peaks", "motion_peaks"), align_counts)
    loudness = lambda a, b, *usual: curve_counts(a.envelope, b.envelope, *usual)
    yield Measure({"envelope correlation": share}, envelopes, loudness)
    yield Measure({"envelope correlation, residual": share}, envelopes, lambda a, b: loudness(a, b, b.typical))
    yield Measure({"activity F1": lambda c: scores(c).f1}, envelopes, active_counts)
    moves = lambda a, b, usual=0.0: curve_counts(a.movement, b.movement, usual, "a still picture")
    yield Measure({"movement correlation": share}, ("movement",) * 2, moves)
    yield Measure({"movement correlation, residual": share}, ("movement",) * 2, lambda a, b: moves(a, b, b.usual))


def pair_rows(measure, clips, rotations=20):
    """Rows of one measure over clips [(made, true, again)]: value with its interval over clips, chance, ceiling.

    made: K outputs; true: what they should be; again: the most that is possible, or None. Chance: the outputs with
    other clips' truths, pooled over so many rotations of the clips; as many as there are clips are all."""
    own = measure.needs[1] == "motion_peaks"
    other = lambda made, true: made if own else true

    def count(made, true):
        needed = getattr(made, measure.needs[0]), getattr(true, measure.needs[1])
        return next((why for why in needed if isinstance(why, str)), None) or measure.count(made, true)

    kept = lambda counted: [c for c in counted if not isinstance(c, str)]
    each = [[count(x, other(x, true)) for x in made] for made, true, _ in clips]
    why = Counter(c for counted in each for c in counted if isinstance(c, str))
    note = "; ".join(f"{n}: {reason}" for reason, n in why.items())
    ours = [kept(counted) for counted in each]
    per_clip = [sum_of(counted) for counted in ours if counted]
    if not per_clip:
        yield row(", ".join(measure.rows), note=note)
        return
    turns = np.unique(np.linspace(1, len(clips) - 1, rotations).astype(int))  # each pairs every clip with another
    strange = [kept(count(x, other(y, clips[i - turn][1])) for turn in turns for x, y in zip(made, clips[i - turn][0]))
               for i, (made, _, _) in enumerate(clips)]
    both = [(sum_of(one), sum_of(wrong)) for one, wrong in zip(ours, strange) if one and wrong]
    best = kept(count(again or true, true) for _, true, again in clips if again or own)
    for name, statistic in measure.rows.items():
        value, low, top = (float(statistic(sum_of(c))) if c else None for c in (per_clip, sum(strange, []), best))
        gains = [np.nan_to_num(statistic(one)) - np.nan_to_num(statistic(wrong)) for one, wrong in both]
        line = row(name, value, TABLE_2.get(name, ""), bootstrap(np.array(per_clip), statistic), low, top,
                   sum(map(len, ours)), note, signed_rank(gains)[1])
        yield line | {"counts": [sum_of(counted).tolist() if counted else None for counted in ours]}


Scene = namedtuple("Scene", "still")  # of a window: its median frame, less the mean over clips, flat


def scene_rows(videos, n):
    """How alike what stands still is in the first and in the last n frames of videos (T, H, W, 3): the correlation of
    the median frames. Chance: with the last frames of other clips. No row where they overlap, or for a clip alone."""
    if len(videos) < 2 or len(videos[0]) < 2 * n:
        return []
    still = np.stack([[np.median(part, axis=0).ravel() for part in (video[:n], video[-n:])] for video in videos])
    still -= still.mean(axis=(0, 1))
    count = lambda a, b: curve_counts(a.still, b.still, constant="a blank picture")
    clips = [([Scene(first)], Scene(last), None) for first, last in still]
    return pair_rows(Measure({"same scene, first and last window": share}, ("still",) * 2, count), clips)


def sum_of(counts):
    """Counts of N clips, added up."""
    return np.sum(counts, axis=0, dtype=float)


def row(metric, value=None, paper="", interval=(None, None), chance=None, ceiling=None, n=0, note="", p=None):
    """A line of the table; `note`: what was skipped and why; p: of Wilcoxon's test against chance, clip by clip."""
    return {"metric": metric, "paper": paper, "value": value, "low": interval[0], "high": interval[1],
            "chance": chance, "p": p, "ceiling": ceiling, "n": n, "note": note}


def score_table(rows, *below):
    """A markdown table of `row`s, and what stands below it."""
    digits = lambda x: "–" if x is None or np.isnan(x) else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"
    lines = [line | {key: digits(line[key]) for key in ("value", "low", "high", "chance", "ceiling")} | {
        "metric": ": ".join(line[key] for key in ("name", "metric") if key in line),
        "p": "–" if line["p"] is None else format(line["p"], ".1g")} for line in rows]
    for line in lines:
        line["ours"] = "{value} [{low}, {high}]".format_map(line).removesuffix(" [–, –]")
    columns = {"metric": "{metric}", "paper¹": "{paper}", "ours [95 %]": "{ours}", "chance²": "{chance}",
               "p⁴": "{p}", "ceiling³": "{ceiling}", "n": "{n}", "skipped, notes": "{note}"}
    return table(columns, lines, "¹ CMMD / nCMMD / MM-Diffusion on AIST++. ² The same outputs against other clips' "
                 "truths. ³ The truth as output: through vocoder or VAE, with its own picture, or a part of the "
                 "reference against the rest. ⁴ Of no difference from chance, clip by clip (Wilcoxon).", *below)


# ---------------------------------------------------------------- distances between sets

TABLE_1 = {(16, 64): ("611 / 703 / 726", "58 / 83 / 48"), (18, 64): ("749 / 799 / 757", "70 / 187 / 71"),
           (32, 64): ("765 / 708 / 871", "53 / 47 / 68"), (18, 128): ("934 / 1036 / –", "78 / 136 / –"),
           (36, 128): ("973 / 882 / –", "49 / 49 / –")}  # FVD and KVD of CMMD / nCMMD / MM-Diffusion


def gaussian(x):
    """Features (n, D), n >= 2 -> their mean (D,) and a factor (min(n, D), D) of the covariance: factor.T @ factor."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features of shape {x.shape}: expected (n, D) with n of at least 2")
    factor = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return x.mean(0), np.linalg.qr(factor, mode="r") if len(x) > x.shape[1] else factor


def frechet(one, two):
    """Fréchet distance (FVD, FAD) of two fits by `gaussian`: |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C1 = A'A and C2 = B'B the trace of the root is the sum of the singular values of AB': no matrix root."""
    (mean, a), (other, b) = one, two
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, float(((mean - other) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * root))


def kernel_distance(x, y):
    """Unbiased squared MMD (KVD) of features (m, D) and (n, D) with the kernel (x.y / D + 1)^3; may be below 0."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    own = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return float(own(kernel(x, x)) + own(kernel(y, y)) - 2 * kernel(x, y).mean())


def video_logits(i3d, paths, frames, size, batch, device):
    """I3D's logits (N, 400) of the first `frames` frames of N files, at 10 fps and `size` px."""
    rows = []
    for part in batches(paths, batch):
        clips = [read_video(path, fps=FPS, size=size, seconds=frames / FPS) for path in part]
        for path, clip in zip(part, clips):
            if len(clip) < frames:
                raise ValueError(f"{path}: has {len(clip)} frames at {FPS} fps, not {frames}")
        x = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float()  # (B, 3, T, H, W) in 0 to 255
        rows.append(i3d(x.to(device), rescale=True, resize=True, return_features=True).cpu())
    return torch.cat(rows).double().numpy()


def load_i3d(path, device):
    """The I3D TorchScript file that the user has; ValueError for another."""
    device = usable_device(device)
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: no TorchScript file ({first_line(error)}); give i3d_torchscript.pt") from None


def video_rows(pairs, i3d, args):
    """Rows of FVD and KVD for every length and size: K N fakes against N reals pooled, and the mean over draws."""
    draws = list(zip(*(pair.generated for pair in pairs)))  # K tuples of N paths
    for frames, size in itertools.product(args.frames, args.sizes):
        try:
            with torch.no_grad():
                made, true = ([video_logits(i3d, paths, frames, size, args.batch, args.device)
                               for paths in group] for group in (draws, [[pair.reference for pair in pairs]]))
        except ValueError as error:
            yield row(f"FVD, KVD, {frames} frames ({size})", note=f"all: {error}")
            continue
        distances = {"FVD": lambda x, y: frechet(gaussian(x), gaussian(y)), "KVD": kernel_distance}
        for (name, distance), paper in zip(distances.items(), TABLE_1.get((frames, size), ("", ""))):
            each = [distance(x, true[0]) for x in made]
            halves = distance(true[0][::2], true[0][1::2]) if len(pairs) > 3 else None
            note = f"per draw {np.mean(each):.1f} ± {np.std(each):.1f}" if len(made) > 1 else ""
            yield row(f"{name}, {frames} frames ({size})", distance(np.concatenate(made), true[0]), paper,
                      ceiling=halves, n=len(made) * len(pairs), note=note)


def embedder(name, files=False):
    """--embedding -> function (path, wave (S,) at 16 kHz) -> (n, D): anybody's, or fadtk's .npy beside `files`."""
    module, colon, function = name.rpartition(":")
    give = "MODULE:FUNCTION or FILE.py:FUNCTION"
    if not colon and not files:
        raise ValueError(f"--embedding {name}: these sounds are in no files that have embeddings, which are of whole "
                         f"clips in folders; give {give}")
    if not colon:
        return lambda path, wave: np.load(path.parent / "embeddings" / name / f"{path.stem}.npy", allow_pickle=False)
    try:
        home = python_file(module, give) if module.endswith(".py") else importlib.import_module(module)
        call = getattr(home, function)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--embedding {name}: {error}; give {give}") from None
    first = lambda x: x[0] if isinstance(x, tuple) else x  # some also return their class scores
    return lambda path, wave: np.asarray(first(call(wave)), dtype=np.float64)


def fit(waves, embed):
    """Waves (S,) -> `gaussian` of all their embeddings."""
    return gaussian(np.concatenate([embed(None, wave.numpy()) for wave in waves]))


def audio_distances(made, true, others):
    """Embeddings (n, D) of N outputs, of their truths, and of the reference's other clips -> FAD per set and sample.

    Ceilings: the truths against the other clips, or, without any, one half of them against the other half; of single
    ones, each against the reference without the tenth of it that the clip is in. Clips of other lengths give other
    numbers of embeddings, and those are not comparable: ValueError."""
    sizes = {len(x) for x in (*made, *true, *others)}
    if len(sizes) > 1:
        raise ValueError(f"clips give {min(sizes)} to {max(sizes)} embeddings: --seconds cuts all to one length")
    reference = gaussian(np.concatenate([*true, *others]))
    one, two = (true, others) if others else (true[::2], true[1::2])
    samples, truth_samples = [frechet(gaussian(x), reference) for x in made if len(x) > 1], []
    for part in range(min(10, len(true))) if samples else ():
        rest = gaussian(np.concatenate([*(x for i, x in enumerate(true) if i % 10 != part), *others]))
        truth_samples += [frechet(gaussian(x), rest) for x in true[part::10]]
    return {"set": frechet(gaussian(np.concatenate(made)), reference), "samples": samples,
            "ceiling": frechet(*(gaussian(np.concatenate(part)) for part in (one, two))), "sizes": [len(one), len(two)],
            "truth_samples": truth_samples}


# ---------------------------------------------------------------- worlds

def batches(items, size):
    """Slices of `items`, `size` long; the last may be shorter."""
    return (items[i:i + size] for i in range(0, len(items), size))


class Worlds:
    """Held-out clips of a world, encoded once; all that is made of them, in any direction, is scored by `rows`.

    make: "sound" (for their pictures), "picture" (for their sounds) or "both" (from nothing but as many seeds)."""

    def __init__(self, models, name, make, seeds, seconds, batch, folder, embed=None):
        self.models, self.name, self.make = models, name, make
        self.seeds, self.batch, self.folder, self.embed = seeds, batch, folder, embed
        self.device = next(models.cmmd.parameters()).device
        c = models.cmmd.config
        self.fps, self.config = c.fps, models.vocoder.config
        self.clips = [WORLDS[name](seed, seconds, c.fps, c.size, c.sample_rate) for seed in seeds]
        self.true = torch.from_numpy(np.stack([clip.audio for clip in self.clips]))  # (N, S)
        self.true_fit = fit(self.true, embed) if embed else None
        # the true sounds' log mel (N, M, L), with as many frames as the model makes for the clip
        self.mel = log_mel(torch.nn.functional.pad(self.true, (0, -self.true.shape[1] % self.config.hop)), self.config)
        self.found = {}  # times of the events found, by way of making
        if make != "sound":  # how frames of other clips look
            self.true_look = self.look(WORLDS[name](seed + len(seeds), seconds, c.fps, c.size).video for seed in seeds)
        if make == "both":  # how this world sounds, and the others
            others = ([world(seed, seconds, c.fps, c.size, c.sample_rate).audio for seed in seeds]
                      for key, world in WORLDS.items() if key != name)
            sounds = self.true, *(torch.from_numpy(np.stack(audio)) for audio in others)
            self.timbres = torch.stack([self.timbre(waves).mean(0) for waves in sounds])
        self.encode()

    @torch.no_grad()
    def encode(self):
        """Video files -> latents (N, T, C, H, W) on the CPU, and PSNR per frame of the VAE and of the baseline."""
        path, videos, latents, quality = Path(self.folder) / "clip.mp4", [], [], []
        for clip in self.clips:  # as a viewer gets them
            write_clip(path, clip.video, fps=self.fps)
            videos.append(read_video(path, self.fps, size=clip.video.shape[1]))
        for part in batches(videos, self.batch):
            frames = to_frames(np.stack(part))
            latents.append(self.models.vae.encode(frames.to(self.device)).cpu())
            back = self.models.vae.decode(latents[-1].to(self.device)).cpu()
            back, true = ((x.flatten(0, 1) + 1) / 2 for x in (back, frames))  # (B*T, 3, H, W) in [0, 1]
            quality.append(torch.stack([psnr(back, true), psnr(bicubic_baseline(true), true)]))
        self.latents = torch.cat(latents)
        self.psnr, self.psnr_bicubic = torch.cat(quality, 1).mean(1).tolist()

    @torch.no_grad()
    def vocode(self, mel):
        """Log mel (N, M, L) -> waves (N, S) of the clips' exact length, through 16-bit wav files."""
        import soundfile
        waves = [self.models.vocoder.decode(part.to(self.device)).cpu() for part in batches(mel, self.batch)]
        path, back = Path(self.folder) / "clip.wav", []
        for wave in torch.cat(waves)[:, :self.true.shape[1]].numpy():
            write_clip(path, audio=wave, sample_rate=self.config.sample_rate)
            back.append(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
        return torch.stack(back)

    def generate(self, **settings):
        """What the model makes -> latents (N, T, C, H, W) and log mel (N, M, L); settings go to `cmmd.generate`."""
        model, made = self.models.cmmd, []
        for latents, mel, seeds in zip(*(batches(x, self.batch) for x in (self.latents, self.mel, self.seeds))):
            video = latents if self.make == "sound" else None
            audio = model.config.normalise(mel) if self.make == "picture" else None
            x = generate(model, video, audio, latents.shape[1], seeds=tuple(seeds), **settings)
            made.append([x[0].cpu(), model.config.denormalise(x[1]).cpu()])
        return [torch.cat(parts) for parts in zip(*made)]

    def look(self, videos):
        """Videos uint8 (T, H, W, 3) -> `gaussian` of the latents of their frames."""
        latents = [self.models.vae.encode(to_frames(video)[None].to(self.device)).cpu() for video in videos]
        return gaussian(torch.cat(latents, 1)[0].flatten(1))  # (1, N*T, C, H, W) -> (N*T, C*H*W)

    def seen(self, videos):
        """What happens in N videos -> Events of each."""
        return [picture_events(video, self.fps, self.name) for video in videos]

    def heard(self, waves):
        """What is heard in waves (N, S) -> Events of each: impacts in `bounce`; in `dance` beats, by librosa, or, to be
        held against what is seen of the same clip, all onsets, of which only those on a beat can match."""
        rate = self.config.sample_rate
        if self.name == "bounce":
            return impacts(log_mel(waves, self.config).numpy(), self.config)
        if self.make == "sound":
            times = [rhythm(wave.numpy(), rate)[0] for wave in waves]
        else:
            times = [onsets(mel, self.config.hop / rate) for mel in log_mel(waves, self.config).numpy()]
        return [Events(found, "beats tell no dancer") for found in times]

    def timbre(self, waves):
        """Waves (N, S) -> their log mel's mean over time (N, M)."""
        return log_mel(waves, self.config).mean(2)

    def own(self, waves):
        """(N,) bool: which of N waves (N, S) are nearer to this world's sounds than to another's, by their timbre."""
        return torch.cdist(self.timbre(waves), self.timbres).argmin(1) == 0

    def rows(self, name, videos, waves):
        """Scores of N videos or waves (N, S) against the true events, or of the two against each other: then of those
        alone that are of this world, since a model that is given nothing may make another."""
        found = self.seen(videos) if self.make == "picture" else self.heard(waves)
        true, stranger = self.clips, Events("of another world", "of another world")
        if self.make == "both":
            own = self.own(waves)
            found, true = ([events if ours else stranger for events, ours in zip(clips, own)]
                           for clips in (found, self.seen(videos)))
            videos, waves = list(itertools.compress(videos, own)), waves[own]
        clips = [([one], other, None) for one, other in zip(found, true)]
        rows = [line for measure in world_measures() for line in pair_rows(measure, clips, rotations=len(clips))]
        if self.embed and self.make != "picture" and len(waves) > 1:
            rows.append(row("Fréchet distance", frechet(fit(waves, self.embed), self.true_fit), n=len(waves)))
        if self.make != "sound" and len(videos):
            rows.append(row("Fréchet distance of frames", frechet(self.look(videos), self.true_look), n=len(videos)))
            rows += scene_rows(videos, self.models.cmmd.config.frames)
        self.found[name] = [None if events is stranger else events.times.round(4).tolist() for events in found]
        return [{"name": name} | line for line in rows if line["value"] is not None]

    def decoded(self, latents, mel):
        """Latents (N, T, C, H, W) and log mel (N, M, L) -> N videos uint8 (T, H, W, 3), N waves; None for what `rows`
        does not look at."""
        videos = None if self.make == "sound" else [
            to_uint8(self.models.vae.decode(one[None].to(self.device)))[0] for one in latents]
        return videos, None if self.make == "picture" else self.vocode(mel)

    def spread(self, videos, latents, mel):
        """How varied N clips are: distances (root mean square) of any two, kinds, counts and tempi seen -> dict."""
        seen, figures = self.seen(videos), {}
        for side, x in (("pictures", latents), ("sounds", self.models.cmmd.config.normalise(mel))):
            apart = torch.pdist(x.flatten(1).double()) / math.sqrt(x[0].numel())
            figures[f"distance of two {side}: least, median"] = [float(apart.min()), float(apart.median())]
        count = Counter(kind for events in seen for kind in events.kinds.tolist())
        figures["share of each kind"] = [count[kind] / max(1, count.total()) for kind in range(len(KIND_HUE))]
        values = {"events a clip": [len(events.times) for events in seen]}
        if self.name == "bounce":
            radii = np.concatenate([balls(video.astype(np.float32) / 255)[1] for video in videos])
            values["ball radius"] = [np.nanmedian(radius) for radius in radii if np.isfinite(radius).any()]
        else:
            values["tempo"] = [60 / np.diff(events.times).mean() for events in seen if len(events.times) > 1]
        for what, x in values.items():
            spread = (np.mean, np.std, np.min, np.max) if x else ()
            figures[f"{what}: mean, deviation, range"] = [float(function(x)) for function in spread]
        return figures

    def quality(self):
        """PSNR of the VAE beside bicubic, and the vocoder on the true sounds beside Griffin-Lim."""
        length = self.true.shape[1]
        slow = torch.cat([griffin_lim(part, self.config) for part in batches(self.mel, self.batch)])[:, :length]
        return {"vae_psnr": self.psnr, "bicubic_psnr": self.psnr_bicubic,
                "vocoder": vocoder_quality(self.vocode(self.mel), self.true, self.config),
                "griffin_lim": vocoder_quality(slow, self.true, self.config)}


def worlds(args):
    """The command `worlds`: what is made of held-out clips of a world, against their true events."""
    check_seeds(args)
    if args.world == "dance" and args.make == "sound":
        if args.seconds < BEAT_SECONDS:
            raise ValueError(f"--seconds {args.seconds:g}: beats in sounds are tracked in {BEAT_SECONDS} s or more")
        extra("librosa")
    embed = embedder(args.embedding) if args.embedding else None
    models = load_models(args.weights, args.device)
    settings = {key: getattr(args, key) for key in ("steps", "guidance", "stochasticity", "sampler")
                if getattr(args, key) is not None}
    check_sampling(condition="clean", **{"steps": None} | settings)
    seeds = range(args.seed_start, args.seed_start + args.n)
    result = {"seeds": [seeds[0], seeds[-1]], "settings": settings, "steps": {}, "variety": {}}
    with tempfile.TemporaryDirectory() as folder:
        world = Worlds(models, args.world, args.make, seeds, args.seconds, args.batch, folder, embed)
        rows = world.rows("true (raw ceiling)", [clip.video for clip in world.clips], world.true)
        through = {"sound": "mel and vocoder", "picture": "the VAE", "both": "VAE, mel and vocoder"}[args.make]
        chain = world.decoded(world.latents, world.mel)
        rows += world.rows(f"true, through {through} (chain ceiling)", *chain)
        both = args.make == "both"  # of which guide is replace
        for condition in dict.fromkeys("replace" if both and way == "guide" else way for way in args.condition):
            start = time.perf_counter()
            made = world.generate(condition=condition, **settings,
                                  progress=lambda done, of: result["steps"].update({condition: of}))
            videos, waves = world.decoded(*made)
            rows += world.rows(condition, videos, waves)
            if both and (own := world.own(waves)).sum() > 1:
                videos = list(itertools.compress(videos, own))
                result["variety"][condition] = world.spread(videos, *(x[own] for x in made))
            print(f"{condition}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if both:
            result["variety"]["the world's own"] = world.spread(chain[0], world.latents, world.mel)
        beats = beat_rows(world.found) if args.world == "dance" and args.make == "sound" else []
        result |= {"rows": beside_ceiling(rows) + beats, "found": world.found, **world.quality()}
    return worlds_table(args, result), result


def world_files(args):
    """The command `clips`: held-out clips of a world as files, SEED.mp4; as of a camera: 256 px, 25 fps."""
    check_seeds(args)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seed_start, args.seed_start + args.n):
        clip = WORLDS[args.world](seed, args.seconds, fps=25, size=256)
        write_clip(folder / f"{seed}.mp4", clip.video, clip.audio, clip.fps, clip.sample_rate)
    print(f"{folder}: {args.n} clips of {args.world}, {args.seconds:g} s each")


def beside_ceiling(rows):
    """The same rows, each with what the chain reaches, and F1 also as a share of that, whose interval is over clips
    drawn for both at once."""
    f1 = lambda counts: scores(counts).f1
    ratio = lambda pooled: f1(pooled[..., 0, :]) / f1(pooled[..., 1, :])
    chain, out = {line["metric"]: line for line in rows if "chain" in line["name"]}, []
    for line in rows:
        top = chain[line["metric"]]
        out.append(line | {"ceiling": top["value"]})
        if line["metric"].startswith("F1") and not line["name"].startswith("true"):
            pairs = zip(line["counts"], top["counts"])
            counts = np.array([pair for pair in pairs if None not in pair])  # (N, 2, counts)
            low, high = bootstrap(counts, ratio)
            share = f"{ratio(counts.sum(0)):.3f} [{low:.3f}, {high:.3f}] of the ceiling"
            out[-1]["note"] = "; ".join(filter(None, (line["note"], share)))
    return out


def beat_rows(found):
    """The paper's beat hit rate and its like, of every way of making sounds, against the beats that are tracked in the
    true sound. found: times of beats in N clips, by way, those of the truth and of the chain first."""
    true, through, *made = ([Heard(beats=beats) for beats in clips] for clips in found.values())
    return [{"name": name} | line for name, one in zip([*found][2:], made) for measure in measures()
            if measure.needs[0] == "beats"
            for line in pair_rows(measure, [([x], y, again) for x, y, again in zip(one, true, through)])]


def worlds_table(args, result):
    """The markdown tables, and the lines below them."""
    settings = [f"{name}: {n} steps" for name, n in result["steps"].items()]
    settings += [f"{key} {value}" for key, value in result["settings"].items() if key != "steps"]
    vocoder, slow, (first, last) = result["vocoder"], result["griffin_lim"], result["seeds"]
    what = {"sound": "of what is heard against the true events", "picture": "of what is seen against the true events",
            "both": "of what is heard against what is seen"}[args.make]
    what += f"; Fréchet distances are on {args.embedding}" if args.embedding else ""
    if args.make != "sound":
        what += "; Fréchet distances of frames are on their latents, to those of as many other true clips"
    text = score_table(
        result["rows"], f"F1 and kinds: {what}.",
        f"n = {args.n} clips of {args.seconds} s of {args.world}, seeds {first} to {last}; weights {args.weights}; "
        f"{', '.join(settings)}.",
        f"VAE PSNR {result['vae_psnr']:.2f} dB (8 x bicubic {result['bicubic_psnr']:.2f} dB). Vocoder mel L1 "
        f"{vocoder['mel_l1']:.3f} (Griffin-Lim {slow['mel_l1']:.3f}), STFT distance {vocoder['stft']:.3f} "
        f"({slow['stft']:.3f}).")
    if not result["variety"]:
        return text
    figures = lambda values: ", ".join(f"{value:.3g}" for value in values)
    lines = [{"variety": key} | {way: figures(one[key]) for way, one in result["variety"].items()}
             for key in result["variety"]["the world's own"]]
    return f"{text}\n\n" + table({way: f"{{{way}}}" for way in lines[0]}, lines)


def compare(args):
    """The command `compare`: two results of `worlds` or `folders`, paired over the same clips: first less second."""
    one, other = results = [read_result(path) for path in args.results]
    tables = [single_counts(path, result) for path, result in zip(args.results, results)]
    if any(one.get(key) != other.get(key) for key in ("seeds", "seconds", "world", "make", "names")):
        raise ValueError(f"{args.results[1]}: has other clips than {args.results[0]}; make both of the same clips")
    lines = []
    for name in [name for name in tables[0] if name in tables[1]]:
        statistic = tables[0][name][0]
        pairs = [pair for pair in zip(*(x[name][1] for x in tables)) if None not in pair]
        if not pairs:
            continue
        counts = np.array(pairs, dtype=np.float64)  # (N, 2, counts)
        gain = lambda pooled: statistic(pooled[..., 0, :]) - statistic(pooled[..., 1, :])
        low, high = bootstrap(counts, gain)
        _, p, n, zeros = signed_rank(np.subtract(*np.nan_to_num(statistic(counts)).T))
        lines.append(f"{name}: {gain(counts.sum(0)):+.3f} [{low:+.3f}, {high:+.3f}], "
                     f"Wilcoxon p = {p:.2g} (n = {n}, {zeros} clips alike)")
    print("\n".join(lines) or "nothing to compare: no row of a name in both")


def single_counts(path, result):
    """A result of `worlds` or `folders` -> {figure: (its statistic, each clip's counts or None where it has none)}."""
    statistics = {name: f for measure in (*world_measures(), *measures()) for name, f in measure.rows.items()}
    known = [line for line in result["rows"] if line.get("metric") in statistics and line.get("counts")]
    found = {", ".join(filter(None, (line.get("name"), line["metric"]))): (statistics[line["metric"]], line["counts"])
             for line in known if not line.get("name", "").startswith("true")}
    if not found:
        raise ValueError(f"{path}: has no counts of single clips; make it anew with `evaluate.py worlds` or `folders`")
    return found


def check_seeds(args):
    """Refuse too few clips, and those that trainings draw."""
    if args.n < 2:
        raise ValueError(f"--n {args.n}: chance needs the events of other clips, take at least 2")
    if args.seed_start + args.n > TRAINING_SEED:
        raise ValueError(f"seeds up to {args.seed_start + args.n - 1}: those from {TRAINING_SEED} on are trained on")


# ---------------------------------------------------------------- right and wrong pairs

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels t, of both sides (`cmmd.levels`)
CANDIDATES = 16


def pairs(args):
    """The command `pairs`: losses of true, shifted and swapped pairs by noise level, and retrieval by loss."""
    check_seeds(args)
    models, most = load_models(args.weights, args.device), 0.4  # s on either side, for shifted sounds
    config, front = models.cmmd.config, models.vocoder.config
    seconds, rate = config.seconds, config.sample_rate
    latents, waves, shifted = [], [], []
    for seed in range(args.seed_start, args.seed_start + args.n):
        clip, rng = bounce(seed, seconds + 2 * most, config.fps, config.size, rate), np.random.default_rng(seed)
        first = round(most * config.fps)
        begin = first / config.fps
        frames = to_frames(clip.video[None, first : first + config.frames])
        latents.append(models.vae.encode(frames.to(next(models.vae.parameters()).device)))
        later = rng.choice([-1, 1]) * rng.uniform(0.1, most)
        for out, start in ((waves, begin), (shifted, begin + later)):
            start = round(start * rate)
            out.append(torch.from_numpy(clip.audio[start : start + round(seconds * rate)]))
    latents = torch.cat(latents)
    mel, moved = (models.cmmd.config.normalise(log_mel(torch.stack(x), front)).to(latents) for x in (waves, shifted))
    rows = [{"t": t} for t in LEVELS]
    sounds = {"right": mel, "shifted": moved, "swapped": mel.roll(1, 0)}
    for line, name in itertools.product(rows, sounds):
        loss = levels_loss(models.cmmd, latents, sounds[name], line["t"]).mean(0)
        line |= {f"video_{name}": float(loss[0]), f"audio_{name}": float(loss[1])}
    found = retrieval(models.cmmd, latents, mel)
    names = [f"{side}_{name}" for side in ("video", "audio") for name in sounds]
    text = table(
        {"t": "{t}"} | {name.replace("_", ", "): f"{{{name}:.3f}}" for name in names}, rows,
        f"Mean squared velocity errors, n = {args.n}. The right one of {CANDIDATES} sounds has the lowest loss: "
        f"{found['retrieval']:.3f}, by the video's alone {found['retrieval_by_video']:.3f} (n = "
        f"{found['retrieval_n']}, chance {1 / CANDIDATES:.3f}); weights {args.weights}.")
    return text, {"rows": rows, **found}


@torch.no_grad()
def levels_loss(model, latents, mel, t, batch=16):
    """Eq. 2 of pairs at one t, the noise the same for every call -> (N, 2), video then audio."""
    noise = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(i)).to(x)
             for i, x in enumerate((latents, mel))]
    out = []
    for video, audio in zip(latents.split(batch), mel.split(batch)):
        times = levels(torch.full((len(video),), t).to(video), model.config.shift)
        same = [n.expand_as(x) for n, x in zip(noise, (video, audio))]
        out.append(joint_loss(model, video, audio, *times, *same))
    return torch.cat(out)


def retrieval(model, latents, mel):
    """Among CANDIDATES sounds, how often has a video's own one the lowest loss over LEVELS: of both sides together, and
    of the video alone, since the sum favours quiet candidates (chance 1 / CANDIDATES)."""
    whole, right = len(latents) // CANDIDATES * CANDIDATES, np.zeros(2)
    for k in range(whole):
        start = k // CANDIDATES * CANDIDATES
        videos = latents[k : k + 1].expand(CANDIDATES, *latents.shape[1:])
        losses = sum(levels_loss(model, videos, mel[start : start + CANDIDATES], t) for t in LEVELS)  # (CANDIDATES, 2)
        right += [int(values.argmin()) == k - start for values in (losses.sum(1), losses[:, 0])]
    both, video = right / whole if whole else (np.nan, np.nan)
    return {"retrieval": float(both), "retrieval_by_video": float(video), "retrieval_n": whole}


# ---------------------------------------------------------------- folders of clips

KINDS = (*VIDEO_TYPES, *SOUND_TYPES, ".avi", ".m4v", ".mp3", ".m4a", ".ogg", ".opus")


def clip_files(folder):
    """{name without ending: path} of a folder's clips, sorted."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder; give one with clips")
    files = {}
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in KINDS):
        if files.setdefault(path.stem, path) != path:
            raise ValueError(f"{path}: {files[path.stem].name} has the same name; keep one of them")
    return files


def match_folders(generated, reference):
    """Clips by name: NAME.mp4, or K draws NAME.0.mp4, NAME.1.mp4 ... for the reference's NAME.mp4 -> Pairs, and what
    either folder has beyond them (paths)."""
    made, true, found = clip_files(generated), clip_files(reference), {}
    for stem in made:
        name, _, draw = stem.rpartition(".")
        name = stem if stem in true else name if draw.isdigit() else None
        if name in true:
            found.setdefault(name, []).append(made[stem])
    if len(found) < 2:
        raise ValueError(f"{generated}: {len(found)} of its {len(made)} clips are named as one of the {len(true)} in "
                         f"{reference}; at least two are needed")
    draws = sorted({len(paths) for paths in found.values()})
    if len(draws) > 1:
        raise ValueError(f"{generated}: {draws[0]} to {draws[-1]} draws of a clip; make as many of each")
    order = lambda paths: sorted(paths, key=lambda path: (len(path.name), path.name))
    pairs = [Pair(name, order(paths), true[name]) for name, paths in found.items()]
    used = {path for pair in pairs for path in pair.generated}
    return pairs, [p for p in made.values() if p not in used], [true[name] for name in true if name not in found]


@torch.no_grad()
def listen(pairs, args, embed, config, fps):
    """Every clip of the pairs, heard -> {name: (K Heard, the truth Heard, and through --vocoder and --vae or None)},
    and why others were left out. Outputs and truth are cut to the same length; movement is seen at `fps`."""
    vocoder = load_vocoder(args.vocoder) if args.vocoder else None
    vae = load_vae(args.vae) if args.vae else None
    clips, left_out = {}, []
    for pair in pairs:
        paths = [*pair.generated, pair.reference]
        try:
            waves = [read_audio(path, config.sample_rate, seconds=args.seconds) for path in paths]
        except ValueError as error:
            left_out.append(str(error))
            continue
        lengths = [len(wave) / config.sample_rate for wave in waves]
        for path, length in zip(paths, lengths):
            if abs(length - lengths[-1]) > SAME_LENGTH:
                raise ValueError(f"{path}: {length:.2f} s long, its reference {lengths[-1]:.2f} s; make them equal, or "
                                 "give --seconds to compare their beginnings")
        waves = [wave[:min(map(len, waves))].copy() for wave in waves]
        look = lambda path: (motion(path, args.seconds), movement(path, fps, args.seconds))
        truth, seen = look(pair.reference), [look(p) for p in pair.generated]
        seen = [(truth[0] if isinstance(moved, str) else peaks, moved) for peaks, moved in seen]  # a sound: truth's
        *made, true = (hear(wave, config, peaks, embed(path, wave) if embed else ())._replace(movement=moved)
                       for wave, path, (peaks, moved) in zip(waves, paths, [*seen, truth]))
        again = Heard(sound_peaks=true.sound_peaks)
        if vocoder:
            padded = np.pad(waves[-1], (0, -len(waves[-1]) % vocoder.config.hop))
            wave = vocoder.decode(log_mel(torch.from_numpy(padded)[None], vocoder.config))[0, :len(waves[-1])]
            again = hear(wave.numpy(), config, truth[0])
        if vae:
            again = again._replace(movement=movement(pair.reference, fps, args.seconds, vae))
        clips[pair.name] = made, true, again if vocoder or vae else None
    return clips, left_out


def add_typical(clips, train=(), moved=()):
    """Cut all envelopes to one length, and give every truth their median level and what to expect at each position: the
    mean envelope and movement of the other clips' truths, or of training envelopes `train` and movements `moved`."""
    length = min(map(len, [*train, *(x.envelope for made, true, _ in clips for x in (*made, true))]))
    cut = lambda heard: heard and heard._replace(envelope=heard.envelope[:length])
    clips = [([cut(x) for x in made], cut(true), cut(again)) for made, true, again in clips]
    envelopes, movements = zip(*((true.envelope, true.movement) for _, true, _ in clips))
    level = np.median(np.concatenate(train or envelopes))
    return [(made, true._replace(typical=typical, level=level, usual=usual), again)
            for (made, true, again), typical, usual in zip(
                clips, expected(envelopes, train), expected(movements, moved))]


def expected(curves, train=()):
    """What to expect of each of N curves (n,), as far as all go: the mean of `train`'s, or else of the others. A string
    in place of a curve says why there is none, and stays."""
    known = [x for x in curves if not isinstance(x, str)]
    length = min(map(len, [*known, *train]), default=0)
    total = sum(x[:length] for x in train or known)
    mean = lambda x: total / len(train) if train else (total - x[:length]) / max(1, len(known) - 1)
    return [x if isinstance(x, str) else mean(x) for x in curves]


def fad_rows(clips, others, result):
    """Rows of the Fréchet audio distances; the values behind Fig. 4 go into `result`."""
    made = [x.embedding for draws, _, _ in clips for x in draws]
    try:
        fad = audio_distances(made, [true.embedding for _, true, _ in clips], others)
    except ValueError as error:
        return [row("FAD", note=f"all: {error}")]
    result["fad"] = fad
    few = "" if fad["samples"] else f"{len(made)}: one embedding a clip, two are needed"
    median = lambda key: float(np.median(fad[key])) if fad[key] else None
    note = "ceiling: {} true clips against {} others".format(*fad["sizes"])
    return [row("FAD per set", fad["set"], ceiling=fad["ceiling"], n=len(made), note=note),
            row("FAD per sample, median", median("samples"), ceiling=median("truth_samples"), n=len(fad["samples"]),
                note=few)]


def folders(args):
    """The command `folders`: clips against the true ones, the paper's values beside; the word may be left out."""
    embed = embedder(args.embedding, files=not args.seconds) if args.embedding else None
    i3d = load_i3d(args.i3d, args.device) if args.i3d else None
    config, result = VocoderConfig(), {}
    pairs, unmatched, others = match_folders(args.generated, args.reference)
    fps = common_rate(path for pair in pairs for path in (*pair.generated, pair.reference))
    heard, left_out = listen(pairs, args, embed, config, fps)
    clips = list(heard.values())
    if len(clips) < 2 and not i3d:
        raise ValueError(f"{args.generated}: {len(clips)} of {len(pairs)} clips have a sound ({left_out[0]})")
    rows = []

    def sounds(paths):  # (path, wave) of those that have one
        for path in paths:
            try:
                yield path, read_audio(path, config.sample_rate, seconds=args.seconds).copy()
            except ValueError as error:
                left_out.append(str(error))

    if len(clips) > 1:
        train, moved, least = [], [], min(len(true.envelope) for _, true, _ in clips)
        for path, wave in sounds(clip_files(args.train).values() if args.train else ()):
            loudness = envelope(log_mel(torch.from_numpy(wave)[None], config))[0]
            if len(loudness) < least:
                left_out.append(f"{path}: shorter than the clips")
                continue
            train.append(loudness)
            moved.append(movement(path, fps, args.seconds))
        if args.train and not train:
            raise ValueError(f"{args.train}: none of its clips has a sound as long as those compared; give others")
        clips = add_typical(clips, train, [x for x in moved if not isinstance(x, str)])
        rows = [line for measure in measures() for line in pair_rows(measure, clips)]
    if embed and len(clips) > 1:
        rows += fad_rows(clips, [embed(path, wave) for path, wave in sounds(others)], result)
    rows += video_rows(pairs, i3d, args) if i3d else ()
    left_out += [f"{path}: not in {args.reference}" for path in unmatched]
    not_asked = [what for what, given in (("FAD (--embedding)", embed), ("FVD, KVD (--i3d)", i3d)) if not given]
    draws = len(pairs[0].generated)
    notes = [f"{args.generated} against {args.reference}: {len(pairs)} clips, {draws} draw(s) of each."]
    notes += [f"Left out ({len(left_out)}): {left_out[0]}."] if left_out else []
    notes += [f"Not asked for: {', '.join(not_asked)}."] if not_asked else []
    return score_table(rows, *notes), result | {"clips": len(pairs), "names": list(heard), "draws": draws,
                                                "left_out": left_out, "not_asked": not_asked, "rows": rows}


# ---------------------------------------------------------------- figures

def figure(args):
    """The command `figure`: the paper's Fig. 2 of a clip, Fig. 4 of results of `folders`, how Eq. 6 trained, frames of
    clips below each other, or results of `worlds` by steps."""
    draw(FIGURES[args.number], args.files, args.picture)


def draw(function, content, path):
    """Let function(drawing, content) draw on an empty figure, and write it to .png, .pdf or .svg."""
    with atomic(check_output(path, (".png", ".pdf", ".svg"))) as temporary:
        drawing = extra("matplotlib.figure").Figure(figsize=(10, 5), dpi=120, layout="constrained")
        function(drawing, content)
        drawing.savefig(temporary)


def draw_events(drawing, files):
    """Fig. 2: frames, the true mel, generated mels; true onsets circled, green where matched and red where missed."""
    config = VocoderConfig()
    hop = config.hop / config.sample_rate
    waves = [torch.from_numpy(read_audio(path, config.sample_rate).copy()) for path in files]
    mels = [log_mel(wave[None], config)[0].numpy() for wave in waves]
    seconds, axes = mels[0].shape[1] * hop, drawing.subplots(1 + len(files))
    video = read_video(files[0], fps=FPS, size=128)
    shown = video[np.linspace(0, len(video) - 1, 12).round().astype(int)]
    axes[0].imshow(np.concatenate(shown, axis=1), aspect="auto", extent=(0, seconds, 0, 1))
    axes[0].set(yticks=[])
    true = onsets(mels[0], hop)
    for axis, path, mel in zip(axes[1:], files, mels):
        axis.imshow(mel, aspect="auto", origin="lower", cmap="magma", extent=(0, mel.shape[1] * hop, 0, len(mel)))
        found = onsets(mel, hop)
        hits = {j: found[i] for i, j in match(found, true, TOLERANCES[1])}
        for j, time in enumerate(true):
            frame = int(np.clip((hits.get(j, time) + ONSET_BIAS) / hop - 0.5, 1, mel.shape[1] - 1))
            loudest = np.argmax(mel[:, frame] - mel[:, frame - 1])  # the bin that rises most
            axis.plot(hits.get(j, time), loudest, "o", ms=16, mfc="none", mew=2, mec="lime" if j in hits else "red")
        axis.set(xlim=(0, seconds), ylabel="mel bin", title=f"{path}: {len(hits)} of {len(true)} true onsets")
    axes[-1].set_xlabel("s")


def draw_fad(drawing, files):
    """Fig. 4: FAD per sample as boxes with whiskers of 1.5 interquartile ranges, per set as x; the truth first."""
    fads = [read_result(path).get("fad") or {} for path in files]
    for path, fad in zip(files, fads):
        if not fad.get("samples"):
            raise ValueError(f"{path}: holds no FAD per sample; make it with: folders ... --embedding E --out {path}")
    axis = drawing.subplots()
    axis.boxplot([fads[0]["truth_samples"], *(fad["samples"] for fad in fads)], whis=1.5,
                 tick_labels=["truth", *(Path(path).stem for path in files)],
                 flierprops={"marker": "+", "markeredgecolor": "red"})
    axis.plot(range(1, len(fads) + 2), [fads[0]["ceiling"], *(fad["set"] for fad in fads)], "kx", ms=9)
    axis.set_ylabel("Fréchet audio distance: boxes per sample, × per set")


def draw_training(drawing, files):
    """Losses (video + audio) of right pairs, with a wrong sound, with a wrong picture, as trainings went on."""
    for axis, path in zip(drawing.subplots(1, len(files), squeeze=False, sharey=True)[0], files):
        rows = [row for row in csv.DictReader(Path(path).read_text().splitlines()) if None not in row.values()]
        if not rows or not {"step", "video", "audio", "wrong_audio", "wrong_video"} <= set(rows[0]):
            raise ValueError(f"{path}: no log of a contrastive training; give cmmd-log.csv of train.py cmmd --eta ...")
        curve = lambda key: np.array([float(row[key]) for row in rows])
        axis.plot(curve("step"), curve("video") + curve("audio"), "k", label="right pairs")
        axis.plot(curve("step"), curve("wrong_audio"), "r", label="wrong sound")
        axis.plot(curve("step"), curve("wrong_video"), "b", label="wrong picture")
        axis.set(yscale="log", xlabel="step", ylabel="loss of Eq. 2", title=Path(path).parent.name)
        axis.legend()


def draw_steps(drawing, files):
    """F1 ±50 ms of results of `worlds` by their steps, a line for each way of sampling; the chain ceiling above."""
    axis, lines = drawing.subplots(), {}
    for path in files:
        result = read_result(path)
        steps = result.get("steps", {})
        found = [line for line in result["rows"] if line.get("metric") == "F1 ±50 ms" and line.get("name") in steps]
        if not found:
            raise ValueError(f"{path}: no result of worlds; make it with: worlds ... --steps N --out {path}")
        for line in found:
            name = f"{line['name']}, {'DPM-Solver++' if result['settings'].get('sampler') == 'dpm' else 'DDIM'}"
            lines.setdefault(name, []).append((steps[line["name"]], line["value"], line["low"], line["high"]))
    for name, points in lines.items():
        steps, f1, low, high = np.array(sorted(points)).T
        axis.errorbar(steps, f1, (f1 - low, high - f1), marker="o", capsize=3, label=name)
    axis.axhline(found[0]["ceiling"], color="grey", ls="--", label="ceiling")
    tried = sorted({point[0] for points in lines.values() for point in points})
    axis.set(xscale="log", xlabel="steps", ylabel="F1 ±50 ms", xticks=tried, xticklabels=map(str, tried))
    axis.minorticks_off()
    axis.legend()


def draw_frames(drawing, files):
    """A row of nine frames of each file, at the middles of equal parts of it."""
    drawing.set_size_inches(10, len(files))
    for axis, path in zip(drawing.subplots(len(files), squeeze=False)[:, 0], files):
        video = read_video(path, fps=FPS, size=128)
        shown = ((np.arange(9) + 0.5) * len(video) / 9).astype(int)
        axis.imshow(np.concatenate(video[shown], axis=1))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(Path(path).parent.name, rotation=0, ha="right", va="center")


FIGURES = {"2": draw_events, "4": draw_fad, "eq6": draw_training, "frames": draw_frames, "steps": draw_steps}


# ---------------------------------------------------------------- the user study

QUESTIONS = {"audio-to-video": ("Video quality", "Temporal alignment of sound and picture"),
             "dance": ("Acoustic quality", "Musical quality", "Synchronisation of the dancer to the music"),
             "sounds": ("Acoustic quality", "Semantic quality: do the sounds make sense in this scene, timing aside?",
                        "Synchronisation of what is heard and seen")}
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Rating of clips</title>
<style>body{font:18px sans-serif;max-width:42em;margin:1em auto}video{width:100%;max-height:55vh;background:#000}
label{margin-right:1.2em}fieldset{margin:.6em 0}button{font:inherit;padding:.4em 2em}</style>
<h1>Rating of clips</h1><p id="where"></p><form id="form"><video id="clip" controls playsinline></video>
<div id="questions"></div><button id="next">Next</button></form>
<p id="end" hidden>Thank you. <button id="save">Download the ratings</button> Please send the file back.</p>
<script>
const study = STUDY, $ = id => document.getElementById(id), rater = Math.random().toString(36).slice(2);
const state = JSON.parse(localStorage.getItem(study.id)) || {rater, at: 0, given: {}};
const keep = () => localStorage.setItem(study.id, JSON.stringify(state));
function show() {
  const done = state.at >= study.items.length, item = study.items[state.at];
  $("where").textContent = done ? "" : `Clip ${state.at + 1} of ${study.items.length}: play it with sound, then ` +
    "rate it from 1 (worst) to 5 (best).";
  $("form").hidden = done; $("end").hidden = !done;
  if (done) return $("clip").removeAttribute("src");
  $("clip").src = item.src;
  $("questions").replaceChildren(...study.questions.map((text, q) => {
    const set = document.createElement("fieldset"), given = (state.given[item.id] || {})[q];
    set.innerHTML = "<legend></legend>" + [1, 2, 3, 4, 5].map(v => `<label><input type="radio" required name="q${q}" ` +
      `value="${v}"${v == given ? "checked" : ""}> ${v}</label>`).join("");
    set.firstChild.textContent = text;
    set.onchange = e => { (state.given[item.id] ||= {})[q] = +e.target.value; keep(); };
    return set; }));
}
$("form").onsubmit = e => { e.preventDefault();
  if (!$("clip").played.length && !$("clip").error) return alert("Please play the clip first.");
  state.at += 1; keep(); show(); };
$("save").onclick = () => { const lines = ["study,rater,item,question,rating"];
  for (const [item, given] of Object.entries(state.given)) for (const [q, rating] of Object.entries(given))
    lines.push([study.id, state.rater, item, q, rating].join());
  const a = document.createElement("a"); a.download = `${study.id}-${state.rater}.csv`;
  a.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], {type: "text/csv"})); a.click(); };
keep(); show();
</script></html>"""


def study(args):
    """The command `study`: a rating page for listeners, and what they said."""
    return STUDY[args.step](args)


def study_make(args):
    """`study make`: write one page of clips in a seeded order, and PAGE.key.csv that tells which clip is whose."""
    page, items = check_output(args.page, (".html",)), []
    for model in args.model:
        name, _, folder = model.partition("=")
        clips = clip_files(folder) if folder else {}
        if not clips:
            raise ValueError(f"--model {model}: expected NAME=FOLDER, a folder that holds clips")
        items += [(name, path) for path in clips.values()]
    for _, path in items:
        media = probe(path)
        if path.suffix.lower() not in (".mp4", ".webm") or not (media.video and media.audio):
            raise ValueError(f"{path}: a page needs .mp4 or .webm clips with picture and sound")
    order = [items[i] for i in np.random.default_rng(args.seed).permutation(len(items))]
    source = lambda path: f"data:video/{path.suffix[1:].lower()};base64,{base64.b64encode(path.read_bytes()).decode()}"
    shown = [{"id": str(k + 1), "src": source(path)} for k, (_, path) in enumerate(order)]
    study = {"questions": QUESTIONS[args.task], "items": shown}
    study["id"] = f"{args.task}-" + hashlib.sha256(json.dumps(study).encode()).hexdigest()[:8]
    with atomic(page) as temporary:
        temporary.write_text(PAGE.replace("STUDY", json.dumps(study), 1), encoding="utf-8")
    key = page.with_suffix(".key.csv")
    write_result(key, {"rows": [{"study": study["id"], "item": k + 1, "model": name, "clip": path.name}
                                for k, (name, path) in enumerate(order)]})
    print(f"{page}: {len(order)} clips, {page.stat().st_size / 2 ** 20:.1f} MiB; its key, not for raters: {key}")


def signed_rank(differences):
    """Wilcoxon's signed-rank test -> statistic, two-sided p, n without zeros, zeros. Exact for ties too: the share of
    all 2^n signs of the (mid-)ranks that are as extreme; above n = 300 the normal distribution tells it well enough.
    Differences are rounded to 1e-6: no float decides."""
    d = np.round(np.asarray(differences, dtype=np.float64), 6)
    zeros, d = int((d == 0).sum()), d[d != 0]
    size = np.abs(d)
    twice = (size[:, None] > size).sum(1) * 2 + (size[:, None] == size).sum(1) + 1  # 2 x midrank: whole numbers
    low = min(int(twice[d > 0].sum()), int(twice[d < 0].sum()))
    if len(d) > 300:
        z = (twice.sum() / 2 - low) / math.sqrt((twice.astype(float) ** 2).sum() / 4)
        return low / 2, math.erfc(z / math.sqrt(2)), len(d), zeros
    chances = np.ones(1)  # of every sum of the ranks with a positive sign
    for rank in twice:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return low / 2, min(1.0, 2 * float(chances[:low + 1].sum())), len(d), zeros


def holm(p):
    """Holm's correction of p values for their number."""
    p, order = np.asarray(p, dtype=np.float64), np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected.tolist()


def read_ratings(files, keys):
    """Files of ratings and of keys -> {(question, model): {rater: mean rating}}."""
    lines = lambda path: csv.DictReader(Path(path).read_text(encoding="utf-8-sig").splitlines())
    models, given, means = {}, {}, {}  # given first: a file read twice counts once
    for path in keys:
        try:
            models |= {(line["study"], line["item"]): line["model"] for line in lines(path)}
        except KeyError as error:
            raise ValueError(f"{path}: has no column {error}; give the .key.csv that `study make` wrote") from None
    for path in files:
        for line in lines(path):
            try:
                item, rating = (line["study"], line["item"]), {str(k): k for k in range(1, 6)}[line["rating"]]
                question = QUESTIONS[line["study"].rpartition("-")[0]][int(line["question"])]
                given.setdefault((question, models[item], line["rater"]), {})[item] = rating
            except (LookupError, ValueError) as error:
                raise ValueError(f"{path}: {error} is unknown; expected ratings of 1 to 5 of a --key's study") from None
    for (question, model, rater), ratings in given.items():
        means.setdefault((question, model), {})[rater] = float(np.mean(list(ratings.values())))
    return means


def study_read(args):
    """`study read`: mean opinion scores and tests between models over raters, and Fig. 5."""
    means = read_ratings([file for file in args.files if file not in args.key], args.key)
    opinions = []
    for (question, model), raters in sorted(means.items()):
        x = list(raters.values())
        opinions.append({"question": question, "model": model, "mean": np.mean(x), "median": np.median(x),
                         "low": min(x), "high": max(x), "raters": len(x)})
    pairs = [(a, b) for a, b in itertools.combinations(sorted(means), 2) if a[0] == b[0]]
    tests = [signed_rank([means[a][r] - means[b][r] for r in means[a] if r in means[b]]) for a, b in pairs]
    compared = [{"question": a[0], "one": a[1], "two": b[1], "w": w, "p": p, "n": n, "zeros": zeros, "holm": q}
                for (a, b), (w, p, n, zeros), q in zip(pairs, tests, holm([p for _, p, *_ in tests]))]
    print(table({"question": "{question}", "model": "{model}", "MOS": "{mean:.2f}", "median": "{median:.2f}",
                 "range": "{low:.2f}–{high:.2f}", "raters": "{raters}"}, opinions), end="\n\n")
    print(table({"question": "{question}", "models": "{one} – {two}", "W": "{w:g}", "n": "{n}", "zeros": "{zeros}",
                 "p": "{p:.4f}", "p, Holm": "{holm:.4f}"}, compared, "Means per rater. Wilcoxon "
                "signed-rank: two-sided, exact, midranks, zeros dropped; Holm over all tests."))
    if args.figure:
        draw(draw_mos, means, args.figure)


def draw_mos(drawing, means):
    """Fig. 5: boxes of the raters' means by question and model; black medians, whiskers to minimum and maximum."""
    questions = sorted({question for question, _ in means})
    for axis, question in zip(drawing.subplots(1, len(questions), sharey=True, squeeze=False)[0], questions):
        models = [model for asked, model in sorted(means) if asked == question]
        axis.boxplot([list(means[question, model].values()) for model in models], tick_labels=models, whis=(0, 100),
                     medianprops={"color": "black", "linewidth": 2})
        axis.set(title=question.partition(":")[0], ylim=(0.9, 5.1))


# ---------------------------------------------------------------- vocoder

def vocoder(args):
    """The command `vocoder`: how near to true sounds Griffin-Lim and vocoders come, folder by folder."""
    networks = {path: load_vocoder(path) for path in args.weights}
    front = {tuple(asdict(network.config)[name] for name in FRONT) for network in networks.values()}
    if len(front) > 1:
        raise ValueError(f"{' and '.join(networks)} take different mels ({', '.join(FRONT)}); measure them one by one")
    config = next(iter(networks.values())).config
    ways = {"Griffin-Lim": lambda mel: griffin_lim(mel, config)}
    ways |= {path: network.decode for path, network in networks.items()}
    embed, rows = args.embedding and embedder(args.embedding), []
    for entry in args.data:
        waves = true_sounds(entry, args, config)
        truth = fit([wave[0] for wave in waves], embed) if embed else None
        for name, way in ways.items():
            row = {"data": entry, "n": len(waves), "sound": name}
            rows.append(row | vocoder_row(way, waves, config, embed, truth))
            print(f"{entry}: {name} done", file=sys.stderr, flush=True)
    columns = {"sounds": "{data}", "n": "{n}", "made by": "{sound}",
               "mel L1 [95 %]": "{mel_l1:.3f} [{mel_l1_interval[0]:.3f}, {mel_l1_interval[1]:.3f}]",
               "STFT distance [95 %]": "{stft:.3f} [{stft_interval[0]:.3f}, {stft_interval[1]:.3f}]",
               "Fréchet distance": "{frechet:.2f}" if embed else "–"}
    return table(columns, rows, f"Up to {args.seconds:g} s of every sound; Fréchet distance on embeddings of "
                 f"{args.embedding or 'nothing (--embedding)'}."), {"rows": rows}


FRONT = ("sample_rate", "n_fft", "hop", "mel_bins", "f_min", "f_max")  # what makes two vocoders' mels the same


def true_sounds(entry, args, config):
    """The waves (1, S) of a folder's files, S whole mel frames and at most args.seconds, or of a world's test seeds."""
    most = int(args.seconds * config.sample_rate)
    if entry in WORLDS:
        seeds = range(TEST_SEED, TEST_SEED + (args.n or 40))
        waves = [WORLDS[entry](seed, args.seconds, size=0, sample_rate=config.sample_rate).audio for seed in seeds]
    else:
        sources = [s for s in find_sources(entry) if not args.held_out or share_of(s.name) == "test"]
        n = min(args.n or len(sources), len(sources))
        waves = []
        for _, path, start, seconds in (sources[i * len(sources) // n] for i in range(n)):  # spread over the names
            try:
                waves.append(read_audio(path, config.sample_rate, start, min(args.seconds, seconds or math.inf)))
            except ValueError as error:
                print(f"skipped {error}", file=sys.stderr)
    whole = [wave[: min(len(wave), most) // config.hop * config.hop] for wave in waves]
    whole = [torch.from_numpy(np.array(wave))[None] for wave in whole if len(wave) > 1024]
    if len(whole) < 2:
        what = "held-out sounds" if args.held_out else "sounds"
        raise ValueError(f"{entry}: holds {len(whole)} {what} that can be measured, at least 2 are needed")
    return whole


def python_file(path, what):
    """The module that a Python file of the user's makes. ValueError if there is none."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; give {what}")
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def vocoder_row(way, waves, config, embed, truth):
    """Figures of way(mel) against the true waves: means over files with their 95 % intervals, and Fréchet distance."""
    made = [way(log_mel(wave, config)).clamp(-1, 1) for wave in waves]
    each = [vocoder_quality(a, b, config) for a, b in zip(made, waves)]
    row = {}
    for key in ("mel_l1", "stft"):
        values = np.array([[quality[key], 1.0] for quality in each])
        row[key], row[f"{key}_interval"] = float(share(values.sum(0))), bootstrap(values, share)
    return row | {"frechet": frechet(truth, fit([wave[0] for wave in made], embed)) if embed else math.nan}


# ---------------------------------------------------------------- speed

def speed(args):
    """The command `speed`: seconds by stage and peak memory of sound for a video file, a fresh process per length."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in args.seconds:
            path, clip = Path(folder) / f"{seconds:g}.mp4", bounce(TEST_SEED, seconds=seconds)
            write_clip(path, clip.video, fps=clip.fps)
            rows.append({"seconds": seconds} | alone(timed_sample, path, args))
            rows[-1]["share"] = rows[-1]["total"] / seconds
    stages = ("read", "encode", "generate", "decode", "write", "other", "total")
    columns = {"video": "{seconds:g} s"} | {stage: f"{{{stage}:.2f}}" for stage in stages} | {
        "per second of video": "{share:.3f}", "peak memory": "{peak_mib:.0f} MiB"}
    return table(columns, rows, "Seconds, after import and loading, one fresh process per length; weights "
                 f"{args.weights}, {args.steps} steps."), {"rows": rows}


def timed(calls, repeats, clock):
    """Seconds of each of several calls, taken in turns -> a list for each."""
    spent = [[] for _ in calls]
    for _, (call, seconds) in itertools.product(range(repeats), zip(calls, spent)):
        start = clock()
        call()
        seconds.append(clock() - start)
    return spent


def alone(function, *arguments):
    """What function(*arguments) returns in a fresh process, which has held nothing before. ValueError if that dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenExecutor:
            raise ValueError(f"the process of {function.__name__} was killed: was there memory enough?") from None


def timed_sample(path, args):
    """Seconds by stage of `sample` on the video file `path`, weights loaded before, and peak memory in MiB.

    It is `sample` itself that runs, with a stopwatch around what it calls; "other" is what lies between."""
    spent = dict.fromkeys(("read", "encode", "generate", "decode", "write"), 0.0)

    def watched(stage, function):
        def call(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or the next stage would wait for this one's work
            spent[stage] += time.perf_counter() - start
            return result
        return call

    models = door.load_models(args.weights, args.device)
    models.vae.encode = watched("encode", models.vae.encode)
    models.vocoder.forward = watched("decode", models.vocoder.forward)
    door.generate, door._video_input = watched("generate", door.generate), watched("read", door._video_input)
    start = time.perf_counter()
    clip = door.sample(path, steps=args.steps, models=models)
    watched("write", clip.save)(path.with_suffix(".out.mp4"))
    total = time.perf_counter() - start
    spent["read"] -= spent["encode"]  # frames are encoded while they are read
    return {**spent, "other": total - sum(spent.values()), "total": total, "peak_mib": peak_memory()}


def peak_memory():
    """This process's largest resident memory in MiB, without its ffmpeg children.

    Linux's VmHWM, because getrusage there also counts what the parent held when it started this process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- ports

PORTS = ("VAE encode", "VAE decode", "MelGAN", "mel")  # against diffusers, diffusers, melgan-neurips, librosa


def ports(args):
    """The command `ports`: our networks beside the originals, same weights and input, in time and memory.

    Times are medians of interleaved repeats in this process; memory is a first call's peak in a fresh one."""
    rows = []
    for what in (what for what in PORTS if what in args.only):
        if what == "MelGAN" and not args.melgan:
            print("MelGAN is left out: it needs --melgan, a clone of descriptinc/melgan-neurips", file=sys.stderr)
            continue
        pair = port_pair(what, args.frames, args.size, args)
        apart = float((pair[0]() - pair[1]()).abs().max())  # also warms up
        seconds = timed(pair, args.repeats, time.process_time)  # of the processor: others' work counts little
        del pair
        memory = [alone(port_memory, what, side, args.frames, args.size, args) for side in (0, 1)]
        median = [float(np.median(x)) for x in seconds]
        rows.append({"what": what, "apart": apart, "seconds": median, "ranges": [[min(x), max(x)] for x in seconds],
                     "mib": memory, "time_ratio": median[0] / median[1], "memory_ratio": memory[0] / memory[1]})
        print(f"{what} done", file=sys.stderr, flush=True)
    lengths = (64, 600) if "VAE decode" in args.only else ()  # 64 frames of 32 x 32 are the most decoded at a time
    long = {n: alone(port_memory, "VAE decode", 0, n, 32, args) for n in lengths}
    columns = {"": "{what}", "ours": "{seconds[0]:.3g} s", "original": "{seconds[1]:.3g} s",
               "time ratio": "{time_ratio:.2f}", "our memory": "{mib[0]:.0f} MiB", "original's": "{mib[1]:.0f} MiB",
               "memory ratio": "{memory_ratio:.2f}", "largest difference": "{apart:.1e}"}
    said = (f"{args.frames} frames of {args.size} x {args.size}, 600 mel frames, the mel of 60 s; medians of "
            f"{args.repeats} interleaved repeats in processor seconds; peak memory of a first call beyond weights, "
            "input and result.")
    decoded = (f"VAE decode of {frames} frames of 32 x 32: {mib:.0f} MiB." for frames, mib in long.items())
    return table(columns, rows, said, *decoded), {"rows": rows, "long": long}


def port_pair(what, frames, size, args):
    """Two functions without arguments that compute the same, (ours, theirs), each -> a tensor."""
    torch.manual_seed(0)
    make = {"MelGAN": lambda: melgan_pair(args.melgan), "mel": mel_pair}.get(what, lambda: vae_pair(what, frames, size))
    try:
        return [torch.no_grad()(call) for call in make()]
    except ImportError as error:
        raise ValueError(f"the comparison of {what} needs {error.name}: pip install diffusers librosa") from None


def vae_pair(what, frames, size):
    """Our VAE and diffusers', published sizes, random weights; both encode as fast as can be and decode in float32."""
    from diffusers import AutoencoderKL
    ours = VAE().eval()
    c = ours.config
    theirs = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                           block_out_channels=c.channels, layers_per_block=c.blocks, latent_channels=c.latent_channels)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    if what == "VAE decode":
        z = torch.randn(1, frames, c.latent_channels, size // c.factor, size // c.factor)
        return lambda: ours.decode(z), lambda: theirs.decode(z[0] / c.scale).sample.clamp(-1, 1)[None]
    x = torch.rand(1, frames, 3, size, size) * 2 - 1

    def encode():
        with fast_autocast("cpu"):
            return theirs.encode(x[0]).latent_dist.mode()[None] * c.scale

    return lambda: ours.encode(x), encode


def melgan_pair(clone):
    """Our generator and that of a clone of descriptinc/melgan-neurips, published sizes, random weights; 9.6 s."""
    mel = torch.randn(1, 80, 600)
    modules = python_file(Path(clone) / "mel2wav" / "modules.py", "a clone of descriptinc/melgan-neurips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's old weight norm
        theirs = modules.Generator(mel.shape[1], 32, 3).eval()
    ours = Vocoder().eval()
    tensors = fold_weight_norm(theirs.state_dict())
    ours.load_state_dict({name: tensors[published] for published, name in published_names(ours.config).items()})
    return lambda: ours.decode(mel), lambda: theirs(mel)[:, 0]


def mel_pair():
    """Our log-mel of 60 s and librosa's, with the same mirrored ends and floor."""
    from librosa.feature import melspectrogram
    wave = torch.randn(1, 60 * 16000) / 10
    c = VocoderConfig()
    pad = (c.n_fft - c.hop) // 2
    settings = dict(sr=c.sample_rate, n_fft=c.n_fft, hop_length=c.hop, n_mels=c.mel_bins, fmin=c.f_min, fmax=c.f_max)

    def theirs():
        padded = np.pad(wave[0].numpy(), pad, mode="reflect")
        mel = melspectrogram(y=padded, power=1, center=False, **settings)
        return torch.from_numpy(np.log10(np.maximum(mel, 1e-5)))[None]

    return lambda: log_mel(wave, c), theirs


def port_memory(what, side, frames, size, args):
    """Peak memory in MiB of one call of ours (side 0) or the original's (1). Blocks above 64 KiB go back at once when
    freed, so that it is what the call holds and not what the allocator keeps."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    return memory_of_call(port_pair(what, frames, size, args)[side])


def memory_of_call(function):
    """Peak resident memory in MiB while function() runs, beyond what stood before it and its result."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    if not Path("/proc/self/clear_refs").exists():
        return math.nan  # Linux alone tells
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    result = function()
    return peak_memory() - before - result.nbytes / 2 ** 20


# ---------------------------------------------------------------- bench

BENCH = {"pass": "a pass, one clip", "mm-diffusion": "a pass of MM-Diffusion's U-Net, one clip",
         "bare": "forward and backward", "step": "step of training",
         **{f"negatives {share} %": f"step with negatives {share} %" for share in (12.5, 25, 50)}}
MM_DIFFUSION = dict(  # its own script's settings: 1.6 s at 64 px, the wave at 16 kHz
    video_size=(16, 3, 64, 64), audio_size=(1, 25600), model_channels=128, video_out_channels=3, audio_out_channels=1,
    num_res_blocks=2, cross_attention_resolutions=[2, 4, 8], cross_attention_windows=[1, 4, 8],
    cross_attention_shift=True, video_attention_resolutions=[2, 4, 8], audio_attention_resolutions=[-1],
    video_type="2d+1d", audio_type="1d", channel_mult=(1, 2, 3, 4), num_head_channels=64, resblock_updown=True,
    use_scale_shift_norm=True)
PASSES = {"pass": 3, "mm-diffusion": 1000}  # to make the sound of a clip: our default; its conditional sampler's


def bench(args):
    """The command `bench`: passes and training steps beside MM-Diffusion's, in fresh processes: time, FLOPs, memory."""
    try:
        [replace(CMMDConfig(**SIZES[size]), **args.config) for size in args.sizes]
    except TypeError as error:
        raise ValueError(f"--config {json.dumps(args.config)}: {error}") from None
    if "mm-diffusion" in args.only and not args.mm_diffusion:
        print("mm-diffusion is left out: it needs --mm-diffusion, a clone of researchmm/MM-Diffusion", file=sys.stderr)
    rows = []
    for size, what in itertools.product(args.sizes, BENCH):
        once = what == "mm-diffusion"  # its size is its own
        if what not in args.only or once and (not args.mm_diffusion or size != args.sizes[0]):
            continue
        row, passes = alone(bench_row, what, size, args), PASSES.get(what, "")
        rows.append(row | {
            "said": BENCH[what], "millions": row["parameters"] / 1e6, "rate": row["clips"] / row["seconds"],
            "passes": passes, "whole": f"{passes * row['seconds']:.3g}" if passes else ""})
    columns = {"": "{said}", "size": "{size}", "parameters": "{millions:.1f} M", "GFLOP": "{gflop:.4g}",
               "seconds": "{seconds:.3g}", "clips/s": "{rate:.3g}", "peak memory": "{mib:.0f} MiB",
               "passes a clip": "{passes}", "seconds a clip": "{whole}"}
    return table(columns, rows, f"Random weights and data; steps over batches of {args.batch} clips of 1.8 s at 64 px; "
                 f"medians of {args.repeats} repeats; memory: peak of a first call beyond weights and input; "
                 f"{args.device}."), {"rows": rows}


def bench_row(what, name, args):
    """One row, measured in this process: median and range of the repeats after a first one, which tells the memory."""
    from torch.utils.flop_counter import FlopCounterMode
    cuda = "cuda" in args.device
    compute, parameters, clips = mm_diffusion_pass(args) if what == "mm-diffusion" else model_call(what, name, args)
    call = lambda: compute().cpu()  # which waits for a GPU to end its work
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    memory = memory_of_call(call)
    if cuda:
        memory = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with FlopCounterMode(display=False) as counter:
        call()
    (seconds,) = timed([call], args.repeats, time.perf_counter)
    return {"what": what, "size": "" if what == "mm-diffusion" else name, "parameters": parameters, "clips": clips,
            "gflop": counter.get_total_flops() / 1e9, "seconds": float(np.median(seconds)),
            "range": [min(seconds), max(seconds)], "mib": memory}


def mm_diffusion_pass(args):
    """A pass over one clip of 1.6 s -> function, parameters, clips. Random weights."""
    sys.path.insert(0, args.mm_diffusion)
    try:
        from mm_diffusion.multimodal_unet import MultimodalUNet
    except ImportError as error:
        raise ValueError(f"--mm-diffusion {args.mm_diffusion}: {error}; give a clone of researchmm/MM-Diffusion, and "
                         "pip install einops") from None
    network = MultimodalUNet(**MM_DIFFUSION).eval().to(args.device)
    video, audio, t = (x.to(args.device) for x in (
        torch.randn(1, 16, 3, 64, 64), torch.randn(1, 1, 25600), torch.full((1,), 500)))

    def call():
        with torch.no_grad(), fast_autocast(args.device):
            return network(video, audio, t)[1]

    return call, sum(x.numel() for x in network.parameters()), 1


def model_call(what, size, args):
    """A pass over one clip of 1.8 s, or forward and backward, or a whole step of training over --batch of them ->
    function, parameters, clips. Random weights and data."""
    config = replace(CMMDConfig(latent_channels=8, **SIZES[size]), **args.config)
    model, clips = CMMD(config).to(args.device), 1 if what == "pass" else args.batch
    side, mels = config.size // 8, whole_mel_frames(config.frames, config)
    shapes = (config.frames, config.latent_channels, side, side), (config.mel_bins, mels)
    draw = lambda n: [torch.randn(n, *shape, device=args.device) for shape in shapes]
    pair, noise, times = draw(clips), draw(clips), [torch.full((clips,), 0.5, device=args.device) for _ in range(2)]
    wrong = draw(max(1, round(clips * float(what.split()[1]) / 100)) if " " in what else 0)
    average = [w.clone() for w in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def one_pass():
        with torch.no_grad(), fast_autocast(args.device):
            return model(*pair, *times)[1]

    def backward(loss):
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def bare():
        with fast_autocast(args.device):
            loss = sum(x.square().mean() for x in model(*pair, *times))
        return backward(loss)

    def step():
        loss = backward(contrastive_loss(model, pair, times, noise, wrong, 0.2, 0.4).total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average, model.parameters()):
                old.lerp_(new, 0.01)
        return loss

    call = {"pass": one_pass, "bare": bare}.get(what, step)
    return call, sum(x.numel() for x in model.parameters()), clips


# ---------------------------------------------------------------- command line

def main(argv=None):
    """The command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["folders", *argv]
    parser = arguments()
    return parser.run(run_command, parser.parse_args(argv))


def run_command(args):
    """Refuse an --out that cannot be written, before any work; then print the text that the command returns, and write
    its result beside the settings. Commands without a result print for themselves."""
    outs = getattr(args, "out", None) or ()
    for path in outs:
        check_output(path, (".json", ".csv"))
    if made := COMMANDS[args.command](args):
        where = machine(getattr(args, "device", "cpu"))
        print(f"{made[0]}\nMeasured on {where}.")
        for path in outs:
            write_result(path, vars(args) | {"machine": where} | made[1])


def arguments():
    """The parser of the command line. What a command is for is told by its function's docstring, after the colon."""
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parsers = {"": parser}
    for within, dest, functions in (("", "command", COMMANDS), ("study", "step", STUDY)):
        made = parsers[within].add_subparsers(dest=dest, required=True)
        for name, function in functions.items():
            parsers[name] = made.add_parser(name, help=function.__doc__.partition(": ")[2].partition("\n\n")[0])
    for names, option, help, settings in OPTIONS:
        if "default" in settings and "default" not in help:
            help += " (default: %(default)s)"
        for name in names.split():
            parsers[name].add_argument(option, help=help, **settings)
    return parser


# Commands, an option of theirs, what it is for (its default is added), and how argparse reads it.
OPTIONS = (
    ("worlds", "--make", "sounds for pictures, pictures for sounds, or both, heard against seen",
     dict(default="sound", choices=["sound", "picture", "both"])),
    ("compare", "results", "", dict(nargs=2, metavar="RESULT.json")),
    ("clips", "folder", "where they are written, SEED.mp4", {}),
    ("worlds clips", "--world", "", dict(default="bounce", choices=WORLDS)),
    ("worlds pairs clips", "--n", "clips", dict(type=int, default=200)),
    ("worlds pairs clips", "--seed-start", "seed of the first clip", dict(type=int, default=TEST_SEED)),
    ("worlds clips", "--seconds", "length of a clip", dict(type=number(0.1, 7200), default=1.8)),
    ("worlds", "--condition", "(default: all; where both are made, guide is replace)",
     dict(nargs="+", default=CONDITIONS, choices=CONDITIONS)),
    ("worlds", "--guidance", "(default: the condition's own)", dict(type=float)),
    ("worlds", "--stochasticity", "share of fresh noise at every step (default: 0)", dict(type=float)),
    ("worlds", "--sampler", "(default: ddim)", dict(choices=["ddim", "dpm"])),
    ("worlds", "--steps", "of the sampler (default: cmmd.sampling_times)", dict(type=int)),
    ("worlds", "--batch", "clips at once", dict(type=number(1, 10**6, int), default=16)),
    ("worlds vocoder", "--embedding", "for the Fréchet distance of sounds: MODULE:FUNCTION or FILE.py:FUNCTION", {}),
    ("speed", "--seconds", "lengths", dict(type=float, nargs="+", default=[10, 100, 600])),
    ("speed", "--steps", "of the sampler", dict(type=int, default=3)),
    ("folders", "generated", "folder of clips, any model's: NAME.mp4, or NAME.0.mp4, NAME.1.mp4 ...", {}),
    ("folders", "reference", "folder of the true NAME.mp4", {}),
    ("folders", "--seconds", "compare the first seconds only (default: all)", dict(type=number(0.01, 7200))),
    ("folders", "--train", "folder whose mean envelope and movement are to be expected (default: the others')", {}),
    ("folders", "--embedding", "for FAD: MODULE:FUNCTION or FILE.py:FUNCTION, wave (S,) at 16 kHz -> (n, D), or the "
     "name of a model whose embeddings fadtk wrote into the folders", {}),
    ("folders", "--i3d", "for FVD and KVD: i3d_torchscript.pt", {}),
    ("folders", "--frames", "", dict(type=int, nargs="+", default=[16, 18, 32, 36])),
    ("folders", "--sizes", "in pixels", dict(type=int, nargs="+", default=[64, 128])),
    ("folders", "--vocoder", "vocoder.safetensors, for the ceiling: the truth through mel and vocoder", {}),
    ("folders", "--vae", "vae.safetensors, for the ceiling of movement: the truth through it", {}),
    ("folders", "--batch", "videos that I3D sees at once", dict(type=int, default=8)),
    ("figure", "number", "", dict(choices=FIGURES)),
    ("figure", "picture", ".png, .pdf or .svg to write", {}),
    ("figure", "files", "2: TRUE GENERATED ...; 4, steps: .json files; eq6: cmmd-log.csv files; frames: clips",
     dict(nargs="+")),
    ("make", "page", ".html to write", {}),
    ("make", "--task", "which of the paper's questions are asked", dict(choices=QUESTIONS, required=True)),
    ("make", "--model", "every clip of each is rated", dict(nargs="+", required=True, metavar="NAME=FOLDER")),
    ("make", "--seed", "another seed, another order", dict(type=int, default=0)),
    ("read", "files", "the raters' .csv files", dict(nargs="+")),
    ("read", "--key", "the .key.csv of the page(s)", dict(nargs="+", required=True)),
    ("read", "--figure", "also draw Fig. 5 to this .png, .pdf or .svg", {}),
    ("vocoder", "--data", f"or a world: {', '.join(WORLDS)}", dict(nargs="+", required=True, metavar="FOLDER")),
    ("vocoder", "--weights", "vocoders, of cmmd or melgan-neurips", dict(nargs="+", required=True)),
    ("vocoder", "--held-out", "only the files that train.py holds out for tests", dict(action="store_true")),
    ("vocoder", "--n", "at most so many sounds of each (of a world: 40)", dict(type=int)),
    ("vocoder", "--seconds", "at most, of each sound", dict(type=number(0.01, 7200), default=5.0)),
    ("ports", "--only", "(default: all)", dict(nargs="+", default=PORTS, choices=PORTS)),
    ("ports", "--melgan", "a clone of descriptinc/melgan-neurips", {}),
    ("ports", "--frames", "", dict(type=int, default=18)),
    ("ports", "--size", "of their sides in pixels", dict(type=int, default=128)),
    ("bench", "--only", "(default: all)", dict(nargs="+", default=list(BENCH), choices=BENCH)),
    ("bench", "--sizes", "(default: both)", dict(nargs="+", default=list(SIZES), choices=SIZES)),
    ("bench", "--config", "other sizes or fusion, as train.py takes: JSON", dict(type=json_object, default={})),
    ("bench", "--mm-diffusion", "a clone of researchmm/MM-Diffusion", dict(metavar="CLONE")),
    ("bench", "--batch", "of the steps of training", dict(type=int, default=8)),
    ("ports bench", "--repeats", "", dict(type=int, default=5)),
    ("worlds pairs speed", "--weights", "name in the box, or folder", dict(default="worlds")),
    ("worlds pairs speed", "--device", "cpu, cuda, ... (default: a GPU if there is one)", {}),
    ("folders", "--device", "for I3D", dict(default="cpu")),
    ("bench", "--device", "", dict(default="cpu")),
    ("worlds pairs speed folders vocoder ports bench", "--out", "also write everything to .json, or the rows to .csv",
     dict(nargs="+")),
)
STUDY = {"make": study_make, "read": study_read}
COMMANDS = {"worlds": worlds, "clips": world_files, "compare": compare, "pairs": pairs, "speed": speed,
            "folders": folders, "figure": figure, "study": study, "vocoder": vocoder, "ports": ports, "bench": bench}


if __name__ == "__main__":
    sys.exit(main())
