"""Three trainings, one skeleton: `python train.py vae|vocoder|cmmd --out FOLDER`.

They train on worlds, each clip drawn fresh unless --clips keeps some, and on any folders of videos with sound (--data).
In this order: the skeleton (State: weights, EMA and optimisers with exact resume; run: the loop), then one plain
training for each network, then the command line.

What step n sees (clips, times, noise) is a function of n and of the settings alone, so a run that was stopped and
resumed with the same settings ends with the same weights, bit for bit on the CPU, as one that was never stopped. It is
drawn for the whole batch, of which each process and each of the --accumulate parts takes its share: any number of them
gives the same weights, to rounding. Several GPUs: `torchrun --nproc-per-node N train.py cmmd ...`.
"""

import argparse
import copy
import csv
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from cmmd import (
    CMMD, SEED, SHARES, SIZES, CMMDConfig, Parser, atomic, contrastive_loss, draw_negatives, draw_times, fast_autocast,
    generate, joint_loss, json_object, load, number, remove_unfinished, save, torchrun_place, usable_device, vae,
    vocoder, whole_mel_frames, write_tensors)
from cmmd.data import (
    TRAINING_SEED, WORLDS, EncodedClip, FileCache, cache_clips, cache_frames, cache_sounds, open_encoded, write_encoded)
from cmmd.evaluate import (
    envelope, envelope_correlation, event_counts, lower_movement, picture_events, psnr, scores, sound_scores)
from cmmd.sample import picture, write_png
from cmmd.vae import VAE, VAEConfig, fingerprint, quick_start, to_frames, to_uint8, vae_loss
from cmmd.vocoder import (
    Discriminator, Vocoder, VocoderConfig, add_weight_norm, discriminator_loss, generator_loss, log_mel, loud_stft_loss,
    mel_loss)

VALIDATION_SEED = 500_000  # worlds from here on choose settings; those from 0 on are the test set
SMALL_VAE = VAEConfig(channels=(16, 32, 64, 96), blocks=1, groups=4, latent_channels=8)
SMALL_VOCODER = VocoderConfig(base=16, mel_mean=-3.9, mel_std=1.0)
UNUSED_STEP = 10**6  # whose batches no step of a training sees: for what is measured before and after it
FREE = ("out", "cache", "device", "workers", "log_every", "eval_every", "save_every",  # may differ on resume
        "accumulate", "compile", "rank", "processes")


# ---- The skeleton


class State:
    """All that a run must keep: networks, one AdamW each, the EMA of the main one, the step and the settings."""

    def __init__(self, networks, main, args, betas=(0.9, 0.999)):
        self.networks, self.main, self.step = networks, main, 0
        self.ema = copy.deepcopy(networks[main]).eval().requires_grad_(False)
        self.optimizers = {name: torch.optim.AdamW(net.parameters(), lr=0.0, betas=betas, weight_decay=0.01, fused=True)
                           for name, net in networks.items()}
        sizes = {f"config {key}": value for key, value in asdict(networks[main].config).items()}
        shared = {key: value for key, value in vars(args).items() if key not in (*FREE, "config")}
        self.settings = json.loads(json.dumps(shared | sizes))  # as it comes back from a file

    def descend(self, name, losses, clip=1.0):
        """One optimiser step of network `name` down the gradient of the sum of losses, averaged over the processes, its
        norm clipped. ValueError, the weights left as they were, where that is not finite."""
        self.optimizers[name].zero_grad(set_to_none=True)
        for loss in losses:  # one after the other, so that only one's graph takes memory
            loss.backward()
        weights = [weight for weight in self.networks[name].parameters() if weight.grad is not None]
        if dist.is_initialized():
            whole = torch.cat([weight.grad.flatten() for weight in weights])
            dist.all_reduce(whole)
            for weight, mean in zip(weights, (whole / dist.get_world_size()).split([w.numel() for w in weights])):
                weight.grad.copy_(mean.view_as(weight))
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(weights, clip)):
            raise ValueError(f"step {self.step}: the gradient of {name} is not finite; the last checkpoint is kept, go "
                             "on from it, or from its beginning with a lower --lr")
        self.optimizers[name].step()

    @torch.no_grad()
    def average(self, decay):
        """EMA of the main network's weights, with a shorter memory during the first steps."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for average, weight in zip(self.ema.state_dict().values(), self.networks[self.main].state_dict().values()):
            average.lerp_(weight, 1 - decay) if average.is_floating_point() else average.copy_(weight)

    def tensors(self):
        """Every tensor of the run under a flat name."""
        out = {f"ema/{k}": w for k, w in self.ema.state_dict().items()}
        for name, net in self.networks.items():
            out |= {f"{name}/{k}": w for k, w in net.state_dict().items()}
            for index, moments in self.optimizers[name].state_dict()["state"].items():
                out |= {f"adam/{name}/{index}/{k}": torch.as_tensor(w) for k, w in moments.items()}
        return {k: w.detach().cpu().contiguous() for k, w in out.items()}

    def save(self, path):
        """Write everything to one safetensors file, whole or not at all; the file before it stays as `before(path)`."""
        tensors = self.tensors()
        if bad := [name for name, w in tensors.items() if not torch.isfinite(w).all()]:
            raise ValueError(f"step {self.step}: {bad[0]} is not finite; the last checkpoint is kept")
        fresh = path.with_stem(f"{path.stem}-new")  # a full disk leaves the one before as it was
        write_tensors(fresh, tensors, {"step": str(self.step), "settings": json.dumps(self.settings)})
        if path.exists():
            os.replace(path, before(path))
        os.replace(fresh, path)

    def resume(self, path):
        """Go on from the newest whole file of `save`, if there is any. ValueError for one of other settings."""
        for file in (path, before(path)):
            try:
                if file.exists():
                    self.load(file)
                    print(f"resuming {file} at step {self.step}", flush=True)
                    return
            except (FileNotFoundError, SafetensorError) as error:
                print(f"{file}: not a whole checkpoint ({error}); removed", flush=True)
                file.unlink(missing_ok=True)

    def load(self, path):
        """Go on from a file of `save`. SafetensorError if it is torn, ValueError if it was made with other settings."""
        with safe_open(str(path), framework="pt") as file:
            tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
        for key, then in json.loads(header["settings"]).items():
            if key not in FREE and self.settings.get(key) != then:
                what = ("other files in --data" if key == "files" else f"{key} {then}, not {self.settings.get(key)}")
                raise ValueError(f"{path}: was started with {what}; give the same to go on, or another --out")
        self.step = int(header["step"])
        strip = lambda prefix: {k[len(prefix):]: w for k, w in tensors.items() if k.startswith(prefix)}
        self.ema.load_state_dict(strip("ema/"))
        for name, net in self.networks.items():
            net.load_state_dict(strip(f"{name}/"))
            moments, weights = {}, list(net.parameters())
            for key, w in strip(f"adam/{name}/").items():
                index, _, field = key.partition("/")
                if w.dim():  # laid out in memory as its weight, which the fused optimiser takes for granted
                    w = torch.empty_like(weights[int(index)]).copy_(w)
                moments.setdefault(int(index), {})[field] = w
            groups = self.optimizers[name].state_dict()["param_groups"]
            self.optimizers[name].load_state_dict({"state": moments, "param_groups": groups})


def learning_rate(step, args):
    """Linear warm-up, then a cosine that would be at 2 % of args.lr one step after the last, or a factor of args.gamma
    a step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.decay == "exponential":
        return args.lr * args.gamma ** (step - args.warmup)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / (args.steps - args.warmup))))


def before(path):
    """Where the checkpoint before the newest is."""
    return path.with_stem(f"{path.stem}-before")


def run(state, batches, update, evaluate, args, finish=lambda ema: ema):
    """The loop -> finish(the EMA). batches[n] are the tensors of step n; update(state, batch) -> {name: loss};
    evaluate(ema) -> {name: figure} now and then, by the first of which the best weights are kept."""
    out, first = Path(args.out), args.rank == 0
    names = ("checkpoint.safetensors", "best.safetensors", "log.csv", "eval.csv")
    checkpoint, best, log, figures = (out / f"{args.task}-{name}" for name in names)
    state.resume(checkpoint)
    for path in (log, figures) if first else ():
        forget(path, state.step)
    if first:
        remove_unfinished(out, f".{args.task}-*")
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(state.step, args.steps), num_workers=args.workers,
        multiprocessing_context="spawn" if args.workers else None, prefetch_factor=4 if args.workers else None)
    sums, usual, began, board = {}, {}, time.time(), tensorboard(out) if first else None
    stream, waited, since = iter(loader), 0.0, time.time()
    while state.step < args.steps:
        asked = time.time()
        try:
            batch = next(stream)
        except ValueError as error:  # a worker's is told with its whole traceback
            raise ValueError(str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")) from None
        waited += time.time() - asked
        for optimizer in state.optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate(state.step, args)
        torch.manual_seed((args.seed * 1_000_003 + state.step) % 2**63)
        losses = over_processes(update(state, [x.to(args.device) for x in batch]))
        state.step += 1
        state.average(args.ema)
        calm, last = watch(usual, losses, state.step), state.step == args.steps
        if not first:
            continue
        for name, value in losses.items():
            sums.setdefault(name, []).append(value)
        if state.step % args.log_every == 0 or last:
            mean = lambda values: torch.tensor(values, dtype=torch.float64).nanmean().item()  # NaN: not in that step
            means = {name: mean(values) for name, values in sums.items()}
            share = round(waited / (time.time() - since), 4)  # of the time since the last line, for data to come
            report(log, {"step": state.step, "seconds": round(time.time() - began, 1), "waited": share} | means, board)
            sums, waited, since = {}, 0.0, time.time()
        if state.step % args.eval_every == 0 or last:  # before saving: a run that resumes has this row
            found = evaluate(state.ema)
            if better(figures, found, args.task):
                save(best, finish(state.ema), torch.float16)
            if found:
                report(figures, {"step": state.step} | found, board)
        if state.step % args.save_every == 0 and calm or last:
            state.save(checkpoint)
    return finish(state.ema)


def over_processes(losses):
    """{name: loss} -> floats, each the mean over the processes that have it; NaN where none has."""
    if not dist.is_initialized():
        return {name: float(x) for name, x in losses.items()}
    values = torch.stack(list(losses.values())).float()
    both = torch.stack([torch.where(values.isnan(), 0.0, values), ~values.isnan()])  # sum, and of how many
    dist.all_reduce(both)
    return dict(zip(losses, (both[0] / both[1]).tolist()))


def watch(usual, losses, step, patience=100):
    """Is every loss at most 10 times its running mean? ValueError once one was not for `patience` steps on end.

    usual: what this keeps of them, by name: running mean, steps seen, steps above."""
    for name, value in losses.items():
        mean, seen, above = usual.get(name, (value, 0, 0))
        above = above + 1 if seen >= patience and value > 10 * mean else 0
        if above == patience:
            raise ValueError(f"step {step}: the loss of {name}, {value:.3g}, has been above 10 times its mean, "
                             f"{mean:.3g}, for {patience} steps; the last checkpoint from before is kept, go on from "
                             "it, or from its beginning with a lower --lr")
        if not above and value == value:  # NaN: there was none in this step
            mean = value if mean != mean else mean + (value - mean) / min(seen + 1, patience)
            seen += 1
        usual[name] = mean, seen, above
    return not any(above for _, _, above in usual.values())


def better(path, found, task):
    """Is the first figure of an evaluation better than all in the file of those before?"""
    sign, value = -1 if task == "vocoder" else 1, next(iter(found.values()), math.nan)
    rows = csv.reader(path.read_text().splitlines()[1:]) if path.exists() else ()
    return value == value and all(not sign * float(row[1]) >= sign * value for row in rows)


def tensorboard(out):
    """A writer for TensorBoard's own files, or None where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))


def report(path, row, board=None):
    """One plain line on the terminal, one row of a CSV file and, if there is a board, its scalars."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v == v}
    print("  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
    if board:
        for name, value in row.items():
            board.add_scalar(name, value, row["step"])
        board.flush()  # a run may be stopped at any time


def forget(path, step):
    """Drop from a log what was written after `step`, where a resumed run starts, and a row that was cut off."""
    if path.exists():
        head, *rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] or [""]
        with atomic(path) as temporary:
            temporary.write_text("".join([head, *(row for row in rows if int(row.split(",")[0]) <= step)]))


def clip_seed(seed, item):
    """The seed of the item-th clip of a training with `seed`, never one of the held-out clips."""
    return TRAINING_SEED + seed * 1_000_000_000 + item


def open_data(args, decode):
    """What --data names -> the sources to train on, one an entry, and {entry: source} of what no step sees: the name of
    a world, whose seeds tell the two apart, or shares of the FileCache decode(folder, cache). ValueError where all of
    its files are held out; resuming is refused where they changed."""
    cache = args.cache or Path(args.out) / "cache"
    sources = [entry if entry in WORLDS else decode(entry, cache) for entry in args.data]
    args.files = [source.fingerprint() for source in sources if isinstance(source, FileCache)]
    if dist.is_initialized():
        found = [None] * args.processes
        dist.all_gather_object(found, args.files)
        if found.count(args.files) < args.processes:
            raise ValueError("the processes could not decode the same files of --data; start again, what is done stays")
    training, unseen = ([source.share(share) if isinstance(source, FileCache) else source for source in sources]
                        for share in ("training", "validation"))
    for entry, own, other in zip(args.data, training, unseen):
        if not own:
            raise ValueError(f"{entry}: all of its files are held out, by their names (data.share_of); add more files")
        if not other:
            print(f"{entry}: too few files for any to be held out: it is not evaluated", flush=True)
    return training, {entry: source for entry, source in zip(args.data, unseen) if source}


@dataclass
class Draws:
    """Batches: [step] -> [tensor (batch, ...)] of what draw(source, seed) gives, `each` at a call, the sources taking
    turns."""

    draw: Callable  # a function that other processes can import
    each: int
    batch: int
    seed: int
    sources: tuple

    def __getitem__(self, step):
        n = -(-self.batch // self.each)
        items = range(step * n, (step + 1) * n)
        drawn = [self.draw(self.sources[i % len(self.sources)], clip_seed(self.seed, i)) for i in items]
        return [torch.cat(drawn)[: self.batch]]


# ---- Autoencoder


def draw_frames(source, seed, n=3):
    """Frames (n, 3, 64, 64) in [-1, 1]: a folder's, or three of each clip of a world from `seed` on."""
    if isinstance(source, FileCache):
        return to_frames(source.frames(seed, n))
    return to_frames(np.concatenate([WORLDS[source](seed + i, fps=5 / 3).video for i in range(n // 3)]))


def train_vae(args):
    """The autoencoder on single frames. A new one's scale and shift are measured at the end, on fresh clips."""
    network = initial(VAE, args.init and vae.load(args.init), SMALL_VAE, args)
    training, unseen = open_data(args, cache_frames)
    frames = Draws(draw_frames, 3, args.batch, args.seed, training)
    if not args.init:
        quick_start(network, replace(frames, batch=240)[UNUSED_STEP][0].to(args.device))
    for part in (network.encoder, network.quant_conv) if args.freeze_encoder else ():
        part.requires_grad_(False)
    state = State({"vae": network}, "vae", args)

    def update(state, batch):
        with fast_autocast(args.device):
            loss, out = vae_loss(network, batch[0])
        state.descend("vae", [loss], clip=math.inf)
        return {"loss": loss.detach(), "psnr": psnr(out.detach() / 2, batch[0] / 2).mean()}  # psnr is for a range of 1

    unseen = {name: draw_frames(source, VALIDATION_SEED, 240)[None].to(args.device)
              for name, source in unseen.items()}

    def evaluate(ema):
        score = lambda x: float(psnr(ema.decode(ema.encode(x)) / 2, x / 2).mean())
        return {f"held_out_psnr {name}": score(x) for name, x in unseen.items()}

    def finish(ema):
        if not args.init:
            ema.config = replace(ema.config, scale=1.0, shift=0.0)
            latents = ema.encode(replace(frames, batch=480)[UNUSED_STEP][0][None].to(args.device))
            deviation, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
            ema.config = replace(ema.config, scale=tuple((1 / deviation).tolist()), shift=tuple(mean.tolist()))
        return ema

    return run(state, frames, update, evaluate, args, finish)


# ---- Vocoder


def draw_sound(source, seed, seconds, sample_rate):
    """A sound (1, S), `seconds` long: of a folder's, or of a clip of a world."""
    if isinstance(source, FileCache):
        return torch.from_numpy(source.wave(seed, round(seconds * sample_rate)))[None]
    return torch.from_numpy(WORLDS[source](seed, seconds, size=0, sample_rate=sample_rate).audio)[None]


def train_vocoder(args):
    """MelGAN with HiFi-GAN's losses, of which the paper names the weights. Before step --adversarial-from, in their
    place, a loss of the loud parts (ours), which learns tones far sooner."""
    generator = add_weight_norm(initial(Vocoder, args.init and vocoder.load(args.init), SMALL_VOCODER, args))
    config = generator.config
    mirrored = max(1024 + config.hop, generator.least_frames * config.hop)  # samples, by the losses and the generator
    least = math.ceil(1e3 * mirrored / config.sample_rate) / 1e3
    if args.seconds < least:
        raise ValueError(f"--seconds {args.seconds:g}: crops at {config.sample_rate} Hz must have {least:g} s or more")
    discriminator = Discriminator(args.discriminator_channels).to(args.device)
    training, unseen = open_data(args, lambda folder, cache: cache_sounds(folder, cache, config.sample_rate))
    draw = partial(draw_sound, sample_rate=config.sample_rate)
    sounds = Draws(partial(draw, seconds=args.seconds), 1, args.batch, args.seed, training)
    state = State({"vocoder": generator, "discriminator": discriminator}, "vocoder", args, betas=(0.8, 0.99))

    def update(state, batch):
        wave = batch[0][:, : batch[0].shape[1] // config.hop * config.hop]
        output = generator(log_mel(wave, config))
        losses = dict.fromkeys(("mel", "loud", "adversarial", "features", "critic"), math.nan)
        if state.step < args.adversarial_from:
            loud, mel = loud_stft_loss(output, wave), mel_loss(output, wave, config)
            state.descend("vocoder", [loud + args.mel_weight * mel])
            return losses | {"mel": mel.detach(), "loud": loud.detach()}
        critic = discriminator_loss(discriminator(wave), discriminator(output.detach()))
        state.descend("discriminator", [critic])
        with torch.no_grad():
            real = discriminator(wave)
        loss = generator_loss(real, discriminator(output), wave, output, config)
        state.descend("vocoder", [loss.total])
        parts = {name: getattr(loss, name).detach() for name in ("mel", "adversarial", "features")}
        return losses | parts | {"critic": critic.detach()}

    unseen = {name: torch.cat([draw(source, VALIDATION_SEED + i, 3.2) for i in range(8)]).to(args.device)
              for name, source in unseen.items()}

    @torch.no_grad()
    def evaluate(ema):
        score = lambda wave: float(mel_loss(ema(log_mel(wave, config)), wave, config))
        return {f"held_out_mel {name}": score(wave) for name, wave in unseen.items()}

    return run(state, sounds, update, evaluate, args, lambda ema: ema.folded())


# ---- The model


@dataclass
class PairBatches:
    """Windows of clips: [step] -> [latents (batch, T, C, H, W), mel (batch, M, L)] and, of the first `negatives`, the
    picture and the sound cut `shift` (from, to; s) earlier or later; those of another clip where this one is no longer
    than a window. The frames go with the mel frames that end within them (18 with 112).

    sources take turns: FileCaches of encoded clips, or names of worlds, drawn fresh and encoded with `vae_path`."""

    batch: int
    seed: int
    config: CMMDConfig
    vae_path: str
    sources: tuple = ("bounce",)
    negatives: int = 0
    shift: tuple = (0.1, 0.4)

    def __post_init__(self):
        self.vae = None  # loaded by the process that draws the batches
        self.other = [another(i, self.batch, len(self.sources)) for i in range(self.batch)]

    def __getitem__(self, step):
        c, rng, true, shifted = self.config, np.random.default_rng([self.seed, step]), [], []
        for i, clip in enumerate(self.draw(step, rng)):
            k = int(rng.integers(0, clip.T - c.frames + 1))
            true.append(self.window(clip, k))
            if i < self.negatives:
                moves = [self.move(rng, k, clip) for _ in range(2)] if clip.T > c.frames else None
                shifted.append(self.window(clip, k, *moves) if moves else None)
        shifted = [window or true[self.other[i]] for i, window in enumerate(shifted)]
        out = []
        for windows in (true, shifted) if self.negatives else (true,):
            pictures, waves = map(torch.stack, zip(*windows))
            out += [pictures, normalised_mel(waves, c)]
        return out

    def window(self, clip, k, move_video=0.0, move_audio=0.0):
        """The clip's picture and wave from frame k on, each moved by so many seconds, the picture by whole frames."""
        c = self.config
        return (clip.picture(k + round(move_video * clip.fps), c.frames),
                clip.sound(k / clip.fps + move_audio, c.seconds))

    def move(self, rng, k, clip):
        """Seconds, within `shift` and a frame at least, by which the window at frame k is cut earlier or later, where
        the clip goes on; less than `shift` where it goes on for less."""
        low, high = (max(x, 1 / clip.fps) for x in self.shift)
        room = k / clip.fps, (clip.T - self.config.frames - k) / clip.fps
        sides = [sign * min(high, space) for sign, space in zip((-1, 1), room) if space > low - 1e-6]
        side = sides[rng.integers(len(sides))] if sides else max((-room[0], room[1]), key=abs)
        return math.copysign(rng.uniform(min(low, abs(side)), abs(side)), side)

    def draw(self, step, rng):
        """This step's clips -> EncodedClips; a world's have room for shifts where there are negatives."""
        c, out, fresh, paths = self.config, [None] * self.batch, {}, {}
        for i in range(self.batch):
            source = self.sources[(step + i) % len(self.sources)]  # by turns: the first places have negatives
            if isinstance(source, FileCache):
                for _ in range(8 if self.negatives else 1):  # `another` clip is another file, where there are several
                    paths[i] = source.paths[source.draw(rng)]
                    if paths[i] != paths.get(i - len(self.sources)):
                        break
                out[i] = open_encoded(paths[i])
            else:
                fresh[i] = WORLDS[source]
        if fresh:
            self.vae = self.vae or vae.load(self.vae_path)
            seconds = with_room(c, self.shift) if self.negatives else c.seconds
            clips = [world(clip_seed(self.seed, step * self.batch + i), seconds, c.fps, c.size, c.sample_rate)
                     for i, world in fresh.items()]
            for i, clip in zip(fresh, encode_clips(clips, self.vae)):
                out[i] = clip
        return out


def with_room(config, shift):
    """Seconds, of whole frames, of a clip that has room to cut a window `shift` (from, to; s), or a frame, earlier or
    later."""
    return math.ceil(config.frames + 2 * max(shift[1] * config.fps, 1) - 1e-9) / config.fps


def another(i, batch, sources):
    """Whose window is the wrong one for sample i of a batch: the one before it of the same source, if there is one."""
    last = batch - 1 - (batch - 1 - i) % sources  # of that source
    return i - sources if i >= sources else last if last != i else i - 1


def normalised_mel(waves, config):
    """Waves (B, S) of a window -> normalised mel (B, M, L), whole frames of it."""
    mel = log_mel(waves, config)[..., : whole_mel_frames(config.frames, config)]
    return config.normalise(mel)


def encode_clips(clips, autoencoder):
    """World clips -> EncodedClips in memory, all encoded at once."""
    device = next(autoencoder.parameters()).device
    latents = autoencoder.encode(to_frames(np.stack([clip.video for clip in clips])).to(device)).cpu()
    waves = torch.from_numpy(np.stack([clip.audio for clip in clips])) * 32767
    short = math.ceil(latents.shape[1] / clips[0].fps * clips[0].sample_rate) - waves.shape[1]  # to its end
    waves = torch.nn.functional.pad(waves, (0, max(0, short)))
    return [EncodedClip(x, y, len(x), clip.fps, clip.sample_rate) for x, y, clip in zip(latents, waves, clips)]


def initial_model(autoencoder, args):
    """A fresh CMMD for these latents, or that of --init. ValueError if that one knows other latents."""
    if autoencoder.config.factor != 8:
        raise ValueError(f"{args.vae}: its latents are 1/{autoencoder.config.factor} of the frames' size, the model's "
                         "1/8: give an autoencoder of four levels")
    default = CMMDConfig(latent_channels=autoencoder.config.latent_channels, **SIZES[args.size or "demo"])
    given, fps = args.init and load(args.init, CMMD), args.config.get("fps")
    if isinstance(fps, (int, float)) and math.isfinite(fps) and fps != (given.config if given else default).fps:
        args.config.setdefault("frames", max(2, round(1.8 * fps)))  # the paper's windows of 1.8 s
    model, own = initial(CMMD, given, default, args), fingerprint(autoencoder)
    if model.config.latent_channels != default.latent_channels:
        raise ValueError(f"{args.vae}: its latents have {default.latent_channels} channels, the model's "
                         f"{model.config.latent_channels}; leave latent_channels out of --config or give another --vae")
    if model.config.latents not in ("", own):
        raise ValueError(f"{args.vae}: another encoder, scale or shift than the model of --init was trained with")
    model.config = replace(model.config, shift=args.time_shift or model.config.shift, latents=own)
    return model


def train_cmmd(args):
    """The joint model (Eq. 2): --first-lesson steps with one side clean, then the mixture (both ours); with --eta the
    joint contrastive loss (Eq. 6), with --margin its bounded form."""
    autoencoder = vae.load(args.vae).to(args.device)
    model = initial_model(autoencoder, args)
    decode = lambda entry, cache: encoded_files(entry, cache, autoencoder, model.config, args)
    training, unseen = open_data(args, decode)
    if not args.init:
        level = mel_level(training, model.config, args)
        model.config = replace(model.config, **{key: x for key, x in level.items() if key not in args.config})
    config = model.config
    state = State({"cmmd": model}, "cmmd", args)
    files = [encoded_world(args, x, autoencoder, config) if args.clips and isinstance(x, str) else x for x in training]
    negatives = round(args.negatives * args.batch) if args.eta else 0
    batches = PairBatches(args.batch, args.seed, config, args.vae, tuple(files), negatives, tuple(args.shift))

    if args.compile:
        model.compile()

    def update(state, batch):
        pair, first = batch[:2], state.step < args.first_lesson
        shifted = batch[2:] or [x[:0] for x in pair]  # none without --eta
        times = draw_times(len(pair[0]), first, args.shares, config.shift)
        times, n = negatives_first(times, len(shifted[0]), args)
        times = [t.to(pair[0].device) for t in times]
        noise = [torch.randn_like(x) for x in pair]
        wrong = [draw_negatives(x[:n], y[:n], x[batches.other[:n]], dim, args.kinds)
                 for x, y, dim in zip(pair, shifted, (1, 2))]
        pieces, parts = args.processes * args.accumulate, []

        def losses():
            for i in range(args.rank, pieces, args.processes):  # samples i, i + pieces ...: so all parts have negatives
                own = [[x[i::pieces] for x in xs] for xs in (pair, times, noise, wrong)]
                eta = args.eta * (pieces * len(own[3][0]) / max(1, n))  # the parts' mean is eta times that of all n
                loss = contrastive_loss(model, *own, eta, args.margin, args.motion[0 if first else 1])
                parts.append([x.detach() for x in loss[1:]])
                yield loss.total / args.accumulate

        state.descend("cmmd", losses())
        positive, wrong_audio, wrong_video = map(torch.cat, zip(*parts))
        parts = {"video": positive[:, 0], "audio": positive[:, 1], "wrong_audio": wrong_audio.sum(dim=1),
                 "wrong_video": wrong_video.sum(dim=1)}
        return {name: x.mean() for name, x in parts.items() if len(x) or batch[2:]}

    unseen = [HeldOut(entry, source, autoencoder, config, args.device, dict(zip(args.data, training))[entry])
              for entry, source in unseen.items()] if args.rank == 0 else []

    def evaluate(ema):
        figures = {}
        names = [re.sub("[^A-Za-z0-9]+", "-", one.name).strip("-")[-40:] for one in unseen]
        for i, (one, name) in enumerate(zip(unseen, names)):
            file = f"cmmd-{name}{f'-{i}' if names.count(name) > 1 else ''}-{state.step}.png"
            found = one.figures(ema, Path(args.out) / file)
            figures |= {f"{name} {one.name}": x for name, x in found.items()}
        return figures

    return run(state, batches, update, evaluate, args)


def negatives_first(times, n, args):
    """Times (B,) of video and audio, reordered (the clips, of which they are independent, are not), those first where
    --negatives-at and --negatives-where allow negatives, and how many of the first n samples get some."""
    high, low = torch.maximum(*times), torch.minimum(*times)
    allowed = (high >= args.negatives_at[0]) & (high <= args.negatives_at[1])
    if args.negatives_where != "any":
        allowed &= (low == 0) == (args.negatives_where == "clean")
    order = allowed.int().argsort(descending=True, stable=True)
    return [t[order] for t in times], min(n, int(allowed.sum()))


class HeldOut:
    """Validation clips of a world, or windows of a folder's validation files, encoded, and what a model makes of them.

    From the middle of each file, or more from long ones where there are few; `training` files tell what is typical."""

    clips = 48

    def __init__(self, name, source, autoencoder, config, device, training=None):
        self.name, self.vae, self.config = name, autoencoder, config
        if isinstance(source, FileCache):
            self.worlds, pairs = None, self.windows(source)
            self.typical = envelope(log_mel(self.sounds(self.windows(training, 512)), config)).mean(axis=0)
        else:
            seconds, seeds = config.seconds, range(VALIDATION_SEED, VALIDATION_SEED + self.clips)
            self.worlds = [WORLDS[source](seed, seconds, config.fps, config.size, config.sample_rate) for seed in seeds]
            pairs = [(clip, 0) for clip in encode_clips(self.worlds, autoencoder)]
        self.waves = self.sounds(pairs)
        self.latents = torch.stack([clip.picture(k, config.frames) for clip, k in pairs]).to(device)
        self.mel = normalised_mel(self.waves, config).to(device)
        self.moved = None if self.worlds else lower_movement(to_uint8(self.vae.decode(self.latents)))

    def windows(self, files, most=None):
        """About `most` windows (clip, first frame), spread over the files."""
        c, most = self.config, most or self.clips
        picked = range(0, len(files.paths), -(-len(files.paths) // most))
        clips = [open_encoded(files.paths[i]) for i in picked]
        count = lambda clip: max(1, min(clip.T // c.frames, most // len(clips)))
        first = lambda clip, i: round((clip.T - c.frames) * (i + 0.5) / count(clip))
        return [(clip, first(clip, i)) for clip in clips for i in range(count(clip))]

    def sounds(self, windows):
        """Their waves (N, S)."""
        c = self.config
        return torch.stack([clip.sound(k / c.fps, c.seconds) for clip, k in windows])

    def figures(self, model, path, steps=8):
        """How well sounds made for the pictures, and pictures made for the sounds, fit; each side's loss at t = 0.95,
        the other clean, or clean and another clip's. `path`: a PNG of a clip over its true and its made sound."""
        x, seeds = (self.latents, self.mel), range(len(self.mel))
        sounds = generate(model, x[0], steps=steps, seeds=seeds, window_batch=16)[1]
        sounds = model.config.denormalise(sounds).cpu().numpy()[..., : self.mel.shape[2]]
        made = generate(model, audio=x[1], frames=x[0].shape[1], steps=steps, seeds=seeds, window_batch=16)[0]
        out = self.world_figures(sounds, made) if self.worlds else self.file_figures(sounds, made)
        high, zero = (torch.full((len(seeds),), t).to(self.mel) for t in (0.95, 0.0))
        for name, other in (("", x), ("_of_others", [y.roll(1, 0) for y in x]))[: len(seeds)]:  # one alone has none
            torch.manual_seed(0)
            noise = [torch.randn_like(y) for y in x]
            with torch.no_grad():
                out["video" + name] = float(joint_loss(model, x[0], other[1], high, zero, *noise)[:, 0].mean())
                out["audio" + name] = float(joint_loss(model, other[0], x[1], zero, high, *noise)[:, 1].mean())
        frames = to_uint8(self.vae.decode(x[0][:1]))[0]
        write_png(path, picture(frames, [self.waves[0].numpy(), sounds[0]], self.config.fps, self.config.sample_rate))
        return out

    def world_figures(self, sounds, made):
        """Onset F1 and pitch (of `bounce`) of sounds (N, M, L), F1 of events in pictures, latents (N, T, C, H, W)."""
        out = sound_scores(sounds, self.worlds, self.config)
        if self.name != "bounce":
            del out["pitch"]  # which is of balls
        seen = [picture_events(frames, self.config.fps, self.name)[0] for frames in to_uint8(self.vae.decode(made))]
        out["seen_100"] = float(scores(event_counts(seen, [clip.times for clip in self.worlds], 0.1).sum(0)).f1)
        return out

    def file_figures(self, sounds, made):
        """Correlation over time with the truth of the loudness of sounds, less what is typical of the training files,
        and of the movement in pictures; beside each that with other clips, which is chance."""
        out, moved = {}, lower_movement(to_uint8(self.vae.decode(made)))
        true = envelope(log_mel(self.waves, self.config))[:, : sounds.shape[2]]
        for name, one, other, typical in (("envelope", envelope(sounds), true, self.typical[: sounds.shape[2]]),
                                          ("motion", moved, self.moved, 0.0)):
            at = lambda by: np.nanmean(envelope_correlation(one, np.roll(other, by, 0), typical))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing, where all are still, is NaN
                out |= {name: float(at(0)), f"{name}_of_others": float(np.mean([at(i) for i in range(1, len(one))]))}
        return out


def encoded_files(entry, cache, autoencoder, config, args):
    """An entry of --data -> FileCache of its clips in this autoencoder's latents, see `data.cache_clips`."""
    encode = lambda frames: autoencoder.encode(to_frames(frames)[None].to(args.device))[0]
    return cache_clips(entry, cache, encode, fingerprint(autoencoder), config.fps, config.size, config.sample_rate,
                       config.frames, with_room(config, args.shift))


def encoded_world(args, name, autoencoder, config):
    """--clips clips of the world `name`, encoded once into the cache or found there -> FileCache."""
    folder = Path(args.cache or Path(args.out) / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder, ".*.safetensors", age=86400)  # nothing that another process is still writing
    seconds = with_room(config, args.shift)
    kind = f"{seconds:g}s-{config.fps:g}-{config.size}-{config.sample_rate}-{fingerprint(autoencoder)}"
    files = tuple(folder / f"{name}-{TRAINING_SEED + i}-{kind}.safetensors" for i in range(args.clips))
    parts = range(0, len(files), 16)
    for i in [*parts[args.rank :: args.processes], *parts]:  # each process its own share first
        if missing := [file for file in files[i : i + 16] if not file.exists()]:
            seeds = [int(file.stem.split("-")[1]) for file in missing]
            clips = [WORLDS[name](seed, seconds, config.fps, config.size, config.sample_rate) for seed in seeds]
            for file, clip, code in zip(missing, clips, encode_clips(clips, autoencoder)):
                write_encoded(file, code.latents, clip.audio, clip.fps, clip.sample_rate)
            if i % 512 == 0:
                print(f"{name}: encoded {i + len(missing)} of {len(files)} clips", flush=True)
    n, T = len(files), math.ceil(seconds * config.fps - 1e-9)
    return FileCache(tuple(file.name for file in files), tuple(map(str, files)), (T,) * n, (0,) * n)


def mel_level(sources, config, args):
    """The mel's mean and deviation over 512 training sounds, the sources taking turns."""
    sounds, seconds = [], config.seconds
    for i in range(512):
        source, seed = sources[i % len(sources)], clip_seed(args.seed, 10**7 + i)
        if isinstance(source, FileCache):
            rng = np.random.default_rng(seed)
            clip = open_encoded(source.paths[source.draw(rng)])
            sounds.append(clip.sound(int(rng.integers(clip.T - config.frames + 1)) / clip.fps, seconds)[None])
        else:
            sounds.append(draw_sound(source, seed, seconds, config.sample_rate))
    mel = log_mel(torch.cat(sounds), config)
    return dict(mel_mean=round(float(mel.mean()), 3), mel_std=round(float(mel.std()), 3))


# ---- Command line


def initial(cls, given, default, args):
    """A fresh network, of the default sizes, or the weights `given` to go on from, but for what --config changes."""
    torch.manual_seed(args.seed)
    default = given.config if given else default
    if unknown := set(args.config) - set(vars(default)):
        raise ValueError(f"--config knows no {', '.join(sorted(unknown))}; it may hold {', '.join(vars(default))}")
    try:
        network = cls(replace(default, **args.config))
        if given:
            network.load_state_dict(given.state_dict())
    except RuntimeError as error:
        if not given:
            raise ValueError(f"--config {json.dumps(args.config)}: makes no {cls.__name__} ({error})") from None
        raise ValueError(f"--config {json.dumps(args.config)}: the weights of --init do not fit these sizes; leave out "
                         "one or the other") from None
    return network.to(args.device)


RECIPES = {  # what each training starts from; all ours
    "vae": dict(steps=1600, batch=12, lr=1.2e-3, warmup=150, ema=0.995),
    "vocoder": dict(steps=2500, batch=1, lr=1e-3, warmup=100, ema=0.995),
    "cmmd": dict(steps=1600, batch=16, lr=1e-3, warmup=60, ema=0.997),
}
MEANING = {"steps": "of the optimiser", "batch": "clips, sounds or frames in a step",
           "lr": "learning rate, at its highest", "warmup": "steps until then",
           "ema": "decay of the weights' moving average, at the end"}
TRAININGS = {"vae": train_vae, "vocoder": train_vocoder, "cmmd": train_cmmd}


def check(args):
    """Refuse, before any work, what cannot run."""
    usable_device(args.device)
    if args.init and args.size:
        raise ValueError("--init brings its own sizes; leave out --size")
    if args.batch % (args.processes * args.accumulate) or (args.processes > 1 and args.task != "cmmd"):
        raise ValueError(f"--batch {args.batch} for {args.processes} processes and --accumulate {args.accumulate}: it "
                         "must be a multiple of their product, and only cmmd trains in several processes")
    if args.task == "vae" and args.freeze_encoder and not args.init:
        raise ValueError("--freeze-encoder keeps the encoder of --init; give one")
    if args.task != "cmmd":
        return
    if args.margin is not None and not args.eta:
        raise ValueError(f"--margin {args.margin:g} bounds the loss of --eta, which is 0: give --eta too, or neither")
    if args.eta and (args.batch < 2 or round(args.negatives * args.batch) < 1):
        raise ValueError(f"--eta {args.eta:g} with --negatives {args.negatives:g} of --batch {args.batch}: not one "
                         "sample has negatives; raise either")
    for name, (low, high) in (("negatives-at", args.negatives_at), ("shift", args.shift)):
        if low > high:
            raise ValueError(f"--{name} {low:g} {high:g}: the lower one comes first")
    if not sum(args.shares) or not sum(args.kinds):
        raise ValueError("--shares or --kinds are all 0: one of them at least must be above")
    if args.first_lesson and not sum(args.shares[2:]):
        raise ValueError("--shares has no samples with a clean side, which the first lesson is made of: "
                         "--first-lesson 0 leaves it out")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def arguments(argv):
    """The command line, with the defaults of the chosen task's recipe."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0], formatter_class=Help)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="vae|vocoder|cmmd")
    for name, recipe in RECIPES.items():
        task = tasks.add_parser(name, formatter_class=Help)
        task.add_argument("--out", required=True, help="folder for checkpoints, logs and the trained weights")
        for key, value in recipe.items():
            bounds = {"ema": (0, 1), "lr": (0, 10), "warmup": (0, 10**9)}.get(key, (1, 10**9))
            task.add_argument(f"--{key}", type=number(*bounds, type(value)), default=value, help=MEANING[key])
        task.add_argument("--seed", type=SEED, default=0, help="another one, other clips (with --clips, "
                          "other windows of them), times and noise")
        task.add_argument("--config", type=json_object, default={}, help="sizes of the network, where not the "
                          "default's or those of --init: JSON")
        task.add_argument("--init", help="weights to start from")
        task.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
        task.add_argument("--workers", type=number(0, 1000, int), default=1, help="processes that prepare batches")
        task.add_argument("--decay", choices=("cosine", "exponential"), default="cosine", help="of the learning rate")
        task.add_argument("--gamma", type=number(0, 1), default=0.999, help="exponential decay: the factor of a step")
        for what, steps in (("log", 20), ("eval", 400), ("save", 100)):
            task.add_argument(f"--{what}-every", type=number(1, kind=int), default=steps, help="in steps")
        task.add_argument("--data", nargs="+", default=["bounce"], metavar="DATA", help="in equal shares: folders of "
                          f"media files, worlds ({', '.join(WORLDS)}), aist:FOLDER:SPLIT_LIST.txt (AIST++) and "
                          "epic:FOLDER:ANNOTATIONS.csv (EPIC-Sounds); of 25 files one is held out for validation, one "
                          "for tests, by their names")
        task.add_argument("--cache", help="where their files are kept decoded, or encoded (default: OUT/cache)")
        if name == "vae":
            task.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone, latents stay")
        if name == "vocoder":
            task.add_argument("--seconds", type=number(0.1), default=4.0, help="length of the crops (paper: 4)")
            task.add_argument("--adversarial-from", type=number(0, kind=int), default=2000,
                              help="first step with discriminators")
            task.add_argument("--mel-weight", type=number(0), default=0.01, help="of the mel loss before that step")
            task.add_argument("--discriminator-channels", type=int, default=256, help="at most (MelGAN's: 1024)")
        if name == "cmmd":
            model_arguments(task)
        else:
            task.set_defaults(accumulate=1, size=None)
    return parser, parser.parse_args(argv)


def model_arguments(task):
    """What only the joint model's training takes."""
    task.add_argument("--size", choices=SIZES, help="of the model, not of the pixels (--config): demo, 10 M "
                      "parameters, unless given; base, 121 M")
    task.add_argument("--accumulate", type=number(1, kind=int), default=1, help="parts in which a batch is "
                      "computed, one after the other, to save memory")
    task.add_argument("--compile", action="store_true", help="torch.compile the model, for a GPU")
    task.add_argument("--vae", required=True, help="weights of the autoencoder")
    task.add_argument("--first-lesson", type=number(0, kind=int), default=400, help="steps with one side clean")
    task.add_argument("--motion", type=number(0, 1), nargs=2, default=(0.0, 0.0), metavar="P", help="share of "
                      "the video loss's weight that lies where the picture moves, during the first lesson and after it")
    task.add_argument("--time-shift", type=number(0.01, 100), help="of the video's noise level where both share "
                      "one t (cmmd.levels); 1: the paper's (default: that of --init, or 1)")
    task.add_argument("--clips", type=number(0, 10**7, int), default=0, help="of a world, draw so many once, into "
                      "the cache, and cut windows from them; 0: always fresh")
    task.add_argument("--eta", type=number(0), default=0.0, help="weight of Eq. 6's contrastive terms; 0: none")
    task.add_argument("--margin", type=number(0), help="bound them: what is this much worse is left alone")
    task.add_argument("--negatives", type=number(0, 1), default=0.25, help="share of the batch that has them")
    task.add_argument("--negatives-at", type=number(0, 1), nargs=2, default=(0.0, 1.0), metavar="T",
                      help="only from this to that noise level, of the noisier side")
    task.add_argument("--negatives-where", choices=("any", "clean", "noisy"), default="any",
                      help="only where one side is clean, or none is")
    task.add_argument("--kinds", type=number(0), nargs=3, default=(1, 1, 1), metavar="P", help="shares of the "
                      "negatives: shift, splice, swap")
    task.add_argument("--shift", type=number(0, 60), nargs=2, default=(0.1, 0.4), metavar="S",
                      help="how far shifts go, from and to, in seconds, but a frame at least")
    task.add_argument("--shares", type=number(0, 1), nargs=4, default=SHARES, metavar="P",
                      help="after the first lesson: of samples with one t, two t, a clean video, a clean sound")


def work(args):
    """The chosen training, whose result goes to TASK.safetensors; in the processes that torchrun started, if any, which
    are args.processes, of which only args.rank 0 speaks and writes."""
    args.rank, args.processes, local = torchrun_place()
    own = args.processes > 1 and args.device == "cuda"
    args.device = f"cuda:{local}" if own else args.device
    check(args)
    if own:
        torch.cuda.set_device(local)
    if args.processes > 1:
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=timedelta(hours=2))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if args.rank else sys.stdout):
            Path(args.out).mkdir(parents=True, exist_ok=True)
            result = TRAININGS[args.task](args)
            if args.rank == 0:
                save(Path(args.out) / f"{args.task}.safetensors", result, torch.float16)
    finally:
        if args.processes > 1:
            dist.destroy_process_group()


def main(argv=None):
    """Command line; returns the exit code, 2 after one line where something is wrong."""
    parser, args = arguments(argv)
    return parser.run(work, args)


if __name__ == "__main__":
    sys.exit(main())
