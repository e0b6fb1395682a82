"""Measurements: scores against known events, and the speed of the whole chain.

In reading order
    matching and scores    match, Score, scores, chance, bootstrap
    onsets                 onset_flux, onsets: the detector, the same for true and for made sounds
    pitch                  pitch_templates, pitch_kind: which ball a sound belongs to
    envelopes              envelope, envelope_correlation (plain and residual)
    pictures and vocoders  psnr, bicubic_baseline, vocoder_quality
    worlds                 held-out clips with known events through files, models and detector
    speed                  seconds by stage, and peak memory, in a fresh process per length
    vocoder                how near to true sounds vocoders come, over folders of files, beside Griffin-Lim
    ports                  our VAE, vocoder and mel beside the originals: time and memory
    command line           python evaluate.py worlds | speed | vocoder | ports

Letters: B batch, T video frames, C channels, H W latent height and width, M mel bins, L mel frames, S samples,
N clips, K kinds of ball. Times are seconds. Every figure is printed beside its chance level, its ceiling and n.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from cmmd import atomic, fast_autocast, generate
from cmmd.data import KIND_PITCH, TRAINING_SEED, WORLDS, bounce, read_audio, read_video, share_of, write_clip
from cmmd.vae import VAE, to_frames
from cmmd.vocoder import (
    Vocoder, VocoderConfig, fold_weight_norm, griffin_lim, load as load_vocoder, log_mel, multi_resolution_stft,
    published_names,
)

# The onset detector. Tuned once on true training sounds of `bounce`, then frozen.
MEL_SHIFT, MEL_SCALE, MEL_CLAMP = 2.6, 1.3, (-1.9, 3.0)  # log10 mel -> about zero mean, unit variance
FLUX_THRESHOLD = 0.35  # mean over bins of the rise from frame to frame
FLUX_RADIUS = 5  # an onset is the largest flux within this many frames on either side
ONSET_BIAS = -0.0045  # s, the mean of (detected - true) time over 6,500 impacts of bounce seeds 5_000_000 to 5_001_999
PITCH_BEFORE, PITCH_AFTER = (-4, -1), (1, 4)  # mel frames around an onset, compared to see what newly sounds

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
        row = {"sound": name}
        for tolerance in TOLERANCES:
            counts, ms = event_counts(found, true, tolerance), round(tolerance * 1000)
            for key, value in scores(counts.sum(0))._asdict().items():
                row[f"{key}_{ms}"] = float(value)
            row[f"interval_{ms}"] = bootstrap(counts, lambda pooled: scores(pooled).f1)
            row[f"chance_{ms}"] = float(chance(found, true, tolerance).f1)
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
    if args.n < 2:
        raise ValueError(f"--n {args.n}: chance needs the events of other clips, take at least 2")
    if args.seed_start + args.n > TRAINING_SEED:
        raise ValueError(f"seeds up to {args.seed_start + args.n - 1}: those from {TRAINING_SEED} on are trained on")
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


def worlds_table(result):
    """The markdown table, and the lines below it."""
    head = "| sound | F1 ±50 ms [95 %] | chance | F1 ±100 ms [95 %] | chance | pitch right [95 %] |"
    lines = [head, "|---" * 6 + "|"]
    span = lambda value, interval: f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    for row in result["rows"]:
        cells = [f"{span(row[f'f1_{ms}'], row[f'interval_{ms}'])} | {row[f'chance_{ms}']:.3f}" for ms in (50, 100)]
        lines.append(f"| {row['sound']} | {' | '.join(cells)} | {span(row['pitch'], row['pitch_interval'])} |")
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    vocoder, slow = result["vocoder"], result["griffin_lim"]
    first, last = result["seeds"]
    return "\n".join(lines + [
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


# ---------------------------------------------------------------- vocoder

def vocoder(args):
    """The command `vocoder`: how near to true sounds Griffin-Lim and vocoders come, folder by folder."""
    check_out(args.out)
    networks = {path: load_vocoder(path) for path in args.weights}
    front = {tuple(asdict(network.config)[name] for name in FRONT) for network in networks.values()}
    if len(front) > 1:
        raise ValueError(f"{' and '.join(networks)} take different mels ({', '.join(FRONT)}); measure them one by one")
    config = next(iter(networks.values())).config
    ways = {"Griffin-Lim": lambda mel: griffin_lim(mel, config)}
    ways |= {path: network.decode for path, network in networks.items()}
    embed, rows = embedding(args.embedding), []
    for entry in args.data:
        waves = true_sounds(entry, args, config)
        truth = [embed(wave[0].numpy()) for wave in waves] if embed else None
        for name, way in ways.items():
            row = {"data": entry, "n": len(waves), "sound": name}
            rows.append(row | vocoder_row(way, waves, config, embed, truth))
            print(f"{entry}: {name} done", file=sys.stderr, flush=True)
    print(vocoder_table(rows, args))
    if args.out:
        write_result(args.out, {"settings": {key: str(value) for key, value in vars(args).items()}, "rows": rows})


FRONT = ("sample_rate", "n_fft", "hop", "mel_bins", "f_min", "f_max")  # what makes two vocoders' mels the same


def true_sounds(entry, args, config):
    """The waves (1, S) of a folder's files, S whole mel frames and at most args.seconds, or of a world's test seeds."""
    most = int(args.seconds * config.sample_rate)
    if entry in WORLDS:
        seeds = range(TEST_SEED, TEST_SEED + (args.n or 40))
        waves = [WORLDS[entry](seed, args.seconds, size=0, sample_rate=config.sample_rate).audio for seed in seeds]
    else:
        paths = sorted(path for path in Path(entry).rglob("*") if path.is_file())
        paths = [path for path in paths if share_of(path) == "test"] if args.held_out else paths
        n = min(args.n or len(paths), len(paths))
        waves = []
        for path in (paths[i * len(paths) // n] for i in range(n)):  # spread over the names
            try:
                waves.append(read_audio(path, config.sample_rate, seconds=args.seconds))
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
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def embedding(path):
    """The function embed(wave float32 (S,)) -> (n, D) of a Python file of the user's; None without a path."""
    if not path:
        return None
    module = python_file(path, "a Python file that defines embed(wave)")
    if not callable(getattr(module, "embed", None)):
        raise ValueError(f"{path}: defines no function embed(wave), float32 (S,) -> (n, D)")

    def embed(wave):
        out = module.embed(wave)
        return np.asarray(out[0] if isinstance(out, tuple) else out, dtype=np.float64)

    return embed


def vocoder_row(way, waves, config, embed, truth):
    """Figures of way(mel) against the true waves: means over files with their 95 % intervals, and Frechet distance."""
    made = [way(log_mel(wave, config)).clamp(-1, 1) for wave in waves]
    each = [vocoder_quality(a, b, config) for a, b in zip(made, waves)]
    row = {}
    for key in ("mel_l1", "stft"):
        values = np.array([[quality[key], 1.0] for quality in each])
        mean = lambda pooled: pooled[..., 0] / pooled[..., 1]
        row[key], row[f"{key}_interval"] = float(mean(values.sum(0))), bootstrap(values, mean)
    if not embed:
        return row | {"frechet": math.nan}
    return row | {"frechet": frechet(np.concatenate(truth), np.concatenate([embed(a[0].numpy()) for a in made]))}


def frechet(x, y):
    """Frechet distance of two sets of embeddings (n, D), (m, D): |difference of means|^2 + Tr(A + B - 2 (A B)^(1/2)),
    A and B their covariances. The trace of the root is the sum of the singular values of the centred products."""
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * root)


def vocoder_table(rows, args):
    """One line per folder and way."""
    lines = ["| sounds | n | made by | mel L1 [95 %] | STFT distance [95 %] | Frechet distance |", "|---" * 6 + "|"]
    for row in rows:
        cells = [f"{row[key]:.3f} [{row[f'{key}_interval'][0]:.3f}, {row[f'{key}_interval'][1]:.3f}]"
                 for key in ("mel_l1", "stft")]
        lines.append(f"| {row['data']} | {row['n']} | {row['sound']} | {' | '.join(cells)} | {row['frechet']:.2f} |")
    return "\n".join(lines + ["", f"Up to {args.seconds:g} s of every sound; Frechet distance on embeddings of "
                                  f"{args.embedding or 'nothing (--embedding)'}; {machine()}."])


# ---------------------------------------------------------------- ports

PORTS = ("VAE encode", "VAE decode", "MelGAN", "mel")  # against diffusers, diffusers, melgan-neurips, librosa


def ports(args):
    """The command `ports`: our networks beside the originals, same weights and input, in time and memory."""
    torch.set_num_threads(args.threads)
    if args.child:
        return print(json.dumps(memory_of_call(port_pair(args.child[0], args)[args.child[1] == "theirs"])))
    check_out(args.out)
    if "MelGAN" in args.only and not args.melgan:
        print("MelGAN is left out: it needs --melgan, a clone of descriptinc/melgan-neurips", file=sys.stderr)
    rows = [port_row(what, args) for what in PORTS if what in args.only and (what != "MelGAN" or args.melgan)]
    lengths = (64, 600) if "VAE decode" in args.only else ()  # 64 frames of 32 x 32 are the most decoded at a time
    long = {n: port_memory("VAE decode", "ours", n, 32, args) for n in lengths}
    result = {"frames": args.frames, "size": args.size, "repeats": args.repeats, "machine": machine(), "rows": rows,
              "long": long}
    print(ports_table(result))
    if args.out:
        write_result(args.out, result)


def port_pair(what, args):
    """Two functions without arguments that compute the same, (ours, theirs), each -> a tensor."""
    torch.manual_seed(0)
    try:
        if what == "MelGAN":
            return melgan_pair(args.melgan)
        return mel_pair() if what == "mel" else vae_pair(what, args.frames, args.size)
    except ImportError as error:
        raise ValueError(f"the comparison of {what} needs {error.name}: pip install diffusers librosa") from None


def vae_pair(what, frames, size):
    """Our VAE and diffusers', published sizes, random weights; both in the fast arithmetic."""
    from diffusers import AutoencoderKL
    ours = VAE().eval()
    c = ours.config
    theirs = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                           block_out_channels=c.channels, layers_per_block=c.blocks, latent_channels=c.latent_channels)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()

    def call(function):
        with torch.no_grad(), fast_autocast("cpu"):
            return function()

    if what == "VAE encode":
        x = torch.rand(1, frames, 3, size, size) * 2 - 1
        return lambda: ours.encode(x), lambda: call(lambda: theirs.encode(x[0]).latent_dist.mode() * c.scale)[None]
    z = torch.randn(1, frames, c.latent_channels, size // c.factor, size // c.factor)
    return lambda: ours.decode(z), lambda: call(lambda: theirs.decode(z[0] / c.scale).sample.clamp(-1, 1))[None]


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

    def theirs_without_gradients():
        with torch.no_grad():
            return theirs(mel)[:, 0]

    return lambda: ours.decode(mel), theirs_without_gradients


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


def port_row(what, args):
    """One comparison: medians of interleaved repeats in this process, peak memory of each in a fresh one.

    Times are of the processor, so what else a machine does counts little; they are seconds where threads are 1."""
    pair, seconds = port_pair(what, args), ([], [])
    apart = float((pair[0]() - pair[1]()).abs().max())  # also warms up
    for _ in range(args.repeats):
        for side, spent in zip(pair, seconds):
            start = time.process_time()
            side()
            spent.append(time.process_time() - start)
    del pair
    memory = [port_memory(what, side, args.frames, args.size, args) for side in ("ours", "theirs")]
    print(f"{what} done", file=sys.stderr, flush=True)
    return {"what": what, "apart": apart, "seconds": [float(np.median(x)) for x in seconds],
            "ranges": [[min(x), max(x)] for x in seconds], "mib": memory}


def port_memory(what, side, frames, size, args):
    """Peak memory in MiB of one call in a fresh process, beyond what stood before it and what it returns. Blocks above
    64 KiB go back at once when freed, so that it is what the call holds and not what the allocator keeps."""
    command = [sys.executable, __file__, "ports", "--child", what, side, "--frames", str(frames), "--size", str(size)]
    command += ["--threads", str(args.threads)] + (["--melgan", args.melgan] if args.melgan else [])
    frugal = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=frugal)
    if child.returncode:
        raise ValueError(f"the process that measured {what} ({side}) ended with {child.returncode}")
    return json.loads(child.stdout)


def memory_of_call(function):
    """Peak resident memory in MiB while function() runs, beyond what stood before it and its result."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    if not Path("/proc/self/clear_refs").exists():
        return math.nan  # Linux alone tells
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    result = function()
    return peak_memory() - before - result.nbytes / 2 ** 20


def ports_table(result):
    """One line per comparison; ratios below 1 are in our favour."""
    lines = ["| | ours | original | time ratio | our memory | original's | memory ratio | largest difference |",
             "|---" * 8 + "|"]
    for row in result["rows"]:
        (ours, theirs), (our_mib, their_mib) = row["seconds"], row["mib"]
        lines.append(f"| {row['what']} | {ours:.3g} s | {theirs:.3g} s | {ours / theirs:.2f} | {our_mib:.0f} MiB | "
                     f"{their_mib:.0f} MiB | {our_mib / their_mib:.2f} | {row['apart']:.1e} |")
    long = [f"VAE decode of {frames} frames of 32 x 32: {mib:.0f} MiB." for frames, mib in result["long"].items()]
    frames, size = result["frames"], result["size"]
    return "\n".join(lines + [
        "", f"{frames} frames of {size} x {size}, 600 mel frames, the mel of 60 s; medians of {result['repeats']} "
        "interleaved repeats in processor seconds; peak memory of a first call beyond weights, input and result; "
        f"{result['machine']}.", *long])


# ---------------------------------------------------------------- command line

def main(argv=None):
    """The command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("worlds", help="held-out bounce clips through the whole chain, against the true impacts")
    one.add_argument("--n", type=int, default=200, help="clips (default: %(default)s)")
    one.add_argument("--seed-start", type=int, default=TEST_SEED, help="seed of the first clip (default: %(default)s)")
    ways = ["clean", "replace", "guide"]
    one.add_argument("--condition", nargs="*", default=ways, choices=ways, help="(default: all three)")
    one.add_argument("--guidance", type=float)
    one.add_argument("--stochasticity", type=float)
    one.add_argument("--sampler", choices=["ddim", "dpm"])
    one.add_argument("--seconds", type=float, default=1.8, help="length of a clip (default: %(default)s)")
    one.add_argument("--batch", type=int, default=16)
    two = commands.add_parser("speed", help="seconds by stage and peak memory of sampling sound for a video file")
    two.add_argument("--seconds", type=float, nargs="+", default=[10, 100, 600], help="lengths (default: %(default)s)")
    two.add_argument("--child", help=argparse.SUPPRESS)  # the file to time, in the fresh process
    for command in (one, two):
        command.add_argument("--weights", default="worlds", help="name in the box, or folder (default: %(default)s)")
        command.add_argument("--steps", type=int, default=6, help="sampler steps (default: %(default)s)")
        command.add_argument("--device")
        command.add_argument("--out", help="also write everything to this .json, or the rows to this .csv")
    three = commands.add_parser("vocoder", help="how near to true sounds vocoders come, beside Griffin-Lim")
    three.add_argument("--data", nargs="+", required=True, metavar="FOLDER", help=f"or a world: {', '.join(WORLDS)}")
    three.add_argument("--weights", nargs="+", required=True, help="vocoders, of cmmd or melgan-neurips")
    three.add_argument("--held-out", action="store_true", help="only the files that train.py holds out for tests")
    three.add_argument("--n", type=int, help="at most so many sounds of each (of a world: 40)")
    three.add_argument("--seconds", type=float, default=5.0, help="at most, of each sound (default: %(default)s)")
    three.add_argument("--embedding", help="a Python file whose embed(wave) -> (n, D) gives the Frechet distance")
    four = commands.add_parser("ports", help="our VAE, vocoder and mel beside the originals: time and memory")
    four.add_argument("--only", nargs="+", default=PORTS, choices=PORTS, help="(default: all)")
    four.add_argument("--melgan", help="a clone of descriptinc/melgan-neurips")
    four.add_argument("--frames", type=int, default=18, help="(default: %(default)s)")
    four.add_argument("--size", type=int, default=128, help="of their sides in pixels (default: %(default)s)")
    four.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    four.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    four.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what and whose to measure, in the fresh process
    for command in (three, four):
        command.add_argument("--out", help="also write everything to this .json, or the rows to this .csv")
    args = parser.parse_args(argv)
    try:
        {"worlds": worlds, "speed": speed, "vocoder": vocoder, "ports": ports}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
