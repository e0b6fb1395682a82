"""Three trainings, one skeleton: `python train.py vae|vocoder|cmmd --out FOLDER`.

They train on the `bounce` world, every clip drawn fresh; `vae` and `vocoder` on any folders too (--data). In this
order: the skeleton (State: weights, EMA and optimisers with exact resume; run: the loop), then one plain training for
each network, then the command line.

What step n sees (clips, times, noise) is a function of n and of the settings alone, so a run that was stopped and
resumed with the same settings ends with the same weights, bit for bit on the CPU, as one that was never stopped.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmmd import (
    CMMD, SEED, CMMDConfig, Parser, atomic, contrastive_loss, draw_negatives, draw_times, fast_autocast, generate,
    joint_loss, load, number, save, vae, vocoder,
)
from cmmd.data import (
    TRAINING_SEED, WORLDS, EncodedClip, FileCache, cache_frames, cache_sounds, open_encoded, write_encoded,
)
from cmmd.evaluate import event_counts, picture_events, psnr, scores, sound_scores
from cmmd.vae import VAE, VAEConfig, quick_start, to_frames, to_uint8, vae_loss
from cmmd.vocoder import (
    Discriminator, DiscriminatorConfig, Vocoder, VocoderConfig, add_weight_norm, discriminator_loss, generator_loss,
    log_mel, loud_stft_loss, mel_loss,
)

VALIDATION_SEED = 500_000  # worlds from here on choose settings; those from 0 on are the test set
SMALL_VAE = VAEConfig(channels=(16, 32, 64, 96), blocks=1, groups=4, latent_channels=8)
SMALL_VOCODER = VocoderConfig(base=16, mel_mean=-3.9, mel_std=1.0)
FREE = ("out", "cache", "device", "threads", "workers", "log_every", "eval_every", "save_every")  # may differ on resume


# ---- The skeleton


class State:
    """All that a run must keep: networks, one AdamW each, the EMA of the main one, the step and the settings."""

    def __init__(self, networks, main, args, betas=(0.9, 0.999), weight_decay=0.01):
        self.networks, self.main, self.step = networks, main, 0
        self.ema = copy.deepcopy(networks[main]).eval().requires_grad_(False)
        self.optimizers = {
            name: torch.optim.AdamW(net.parameters(), lr=0.0, betas=betas, weight_decay=weight_decay)
            for name, net in networks.items()
        }
        sizes = {f"config {key}": value for key, value in asdict(networks[main].config).items()}
        shared = {key: value for key, value in vars(args).items() if key not in (*FREE, "config")}
        self.settings = json.loads(json.dumps(shared | sizes))  # as it comes back from a file

    def descend(self, name, loss, clip=1.0):
        """One optimiser step of network `name` down the gradient of loss, its norm clipped."""
        if not torch.isfinite(loss):
            raise ValueError(f"step {self.step}: the loss of {name} is {loss.item()}; the last checkpoint is kept")
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.networks[name].parameters(), clip)
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
        """Write everything to one safetensors file, whole or not at all."""
        header = {"step": str(self.step), "settings": json.dumps(self.settings)}
        with atomic(path) as temporary:
            save_file(self.tensors(), temporary, metadata=header)

    def load(self, path):
        """Go on from a file of `save`. ValueError if it is torn or was made with other settings."""
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole checkpoint ({error}); remove it to start anew") from None
        for key, then in json.loads(header["settings"]).items():
            if self.settings.get(key) != then:
                raise ValueError(f"{path}: was started with {key} {then}, not {self.settings.get(key)}; "
                                 "give the same settings to go on, or another --out")
        self.step = int(header["step"])
        strip = lambda prefix: {k[len(prefix):]: w for k, w in tensors.items() if k.startswith(prefix)}
        self.ema.load_state_dict(strip("ema/"))
        for name, net in self.networks.items():
            net.load_state_dict(strip(f"{name}/"))
            moments = {}
            for key, w in strip(f"adam/{name}/").items():
                index, _, field = key.partition("/")
                moments.setdefault(int(index), {})[field] = w
            groups = self.optimizers[name].state_dict()["param_groups"]
            self.optimizers[name].load_state_dict({"state": moments, "param_groups": groups})


def learning_rate(step, args):
    """Linear warm-up, then a cosine down to 2 % of args.lr at the last step, or a factor of args.gamma a step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.decay == "exponential":
        return args.lr * args.gamma ** (step - args.warmup)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / (args.steps - args.warmup))))


def run(state, batches, update, evaluate, args):
    """The loop -> the EMA. batches[n] are the tensors of step n; update(state, batch) -> {name: loss}; evaluate(ema) ->
    {name: figure} now and then."""
    out = Path(args.out)
    names = ("checkpoint.safetensors", "log.csv", "eval.csv")
    checkpoint, log, figures = (out / f"{args.task}-{name}" for name in names)
    if checkpoint.exists():
        state.load(checkpoint)
        print(f"resuming {checkpoint} at step {state.step}", flush=True)
    for path in (log, figures):
        forget(path, state.step)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(state.step, args.steps), num_workers=args.workers,
        multiprocessing_context="spawn" if args.workers else None, prefetch_factor=4 if args.workers else None,
    )
    sums, began = {}, time.time()
    for batch in loader:
        for optimizer in state.optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate(state.step, args)
        torch.manual_seed(args.seed * 1_000_003 + state.step)
        losses = update(state, [x.to(args.device) for x in batch])
        state.step += 1
        state.average(args.ema)
        for name, value in losses.items():
            sums.setdefault(name, []).append(float(value))
        last = state.step == args.steps
        if state.step % args.log_every == 0 or last:
            mean = lambda values: torch.tensor(values, dtype=torch.float64).nanmean().item()  # NaN: not in that step
            means = {name: mean(values) for name, values in sums.items()}
            report(log, {"step": state.step, "seconds": round(time.time() - began, 1)} | means)
            sums = {}
        if state.step % args.save_every == 0 or last:
            state.save(checkpoint)
        if state.step % args.eval_every == 0 or last:
            report(figures, {"step": state.step} | evaluate(state.ema))
    return state.ema


def report(path, row):
    """One plain line on the terminal and one row of a CSV file."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v == v}
    print("  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def forget(path, step):
    """Drop from a log what was written after `step`, where a resumed run starts."""
    if path.exists():
        head, *rows = path.read_text().splitlines(keepends=True)
        with atomic(path) as temporary:
            temporary.write_text("".join([head] + [row for row in rows if int(row.split(",")[0]) <= step]))


def clip_seed(args_seed, step, item, per_step):
    """A seed for item `item` of step `step`, never one of the held-out clips."""
    return TRAINING_SEED + args_seed * 1_000_000_000 + step * per_step + item


def open_data(args, decode):
    """What --data names: worlds stay names, a folder becomes decode(folder, cache), a FileCache. Resuming is refused
    where the files changed."""
    cache = args.cache or Path(args.out) / "cache"
    sources = [entry if entry in WORLDS else decode(entry, cache) for entry in args.data]
    args.files = [source.fingerprint() for source in sources if isinstance(source, FileCache)]
    return sources


def training_share(args, sources):
    """`open_data`'s sources without the files that are held out. ValueError where none is left."""
    shares = [source.share("training") if isinstance(source, FileCache) else source for source in sources]
    for entry, share in zip(args.data, shares):
        if isinstance(share, FileCache) and not share.names:
            raise ValueError(f"{entry}: all of its files are held out, by their names (data.share_of); add more files")
    return shares


def held_out(args, sources, world, files):
    """By entry of --data what no step sees: world(its function), or files(its validation share) if that holds any."""
    drawn = {}
    for entry, source in zip(args.data, sources):
        if not isinstance(source, FileCache):
            drawn[entry] = world(WORLDS[source])
        elif (share := source.share("validation")).names:
            drawn[entry] = files(share)
    return drawn


# ---- Autoencoder


@dataclass
class FrameBatches:
    """Single frames: [step] -> [frames (batch, 3, size, size) in [-1, 1]], three from each clip of a world or drawn
    from a folder, the sources taking turns."""

    batch: int
    seed: int
    size: int = 64
    sources: tuple = ("bounce",)

    def __getitem__(self, step):
        clips = -(-self.batch // 3)
        return [to_frames(np.concatenate([self.three(step * clips + i) for i in range(clips)])[: self.batch])]

    def three(self, item):
        source, seed = self.sources[item % len(self.sources)], clip_seed(self.seed, item, 0, 1)
        if isinstance(source, FileCache):
            return source.frames(seed, 3)
        return WORLDS[source](seed, fps=5 / 3, size=self.size).video


def train_vae(args):
    """The autoencoder on single frames. A new one's scale and shift are measured at the end, on fresh clips."""
    network = initial(VAE, vae.load, SMALL_VAE, args)
    sources = open_data(args, cache_frames)
    frames = FrameBatches(args.batch, args.seed, sources=training_share(args, sources))
    if not args.init:
        quick_start(network, replace(frames, batch=240)[10**6][0])
    for part in (network.encoder, network.quant_conv) if args.freeze_encoder else ():
        part.requires_grad_(False)
    state = State({"vae": network}, "vae", args)

    def update(state, batch):
        with fast_autocast(args.device):
            loss, out = vae_loss(network, batch[0])
        state.descend("vae", loss, clip=math.inf)
        return {"loss": loss.detach(), "psnr": psnr(out.detach() / 2, batch[0] / 2).mean()}

    unseen = held_out(
        args, sources, lambda world: np.concatenate([world(VALIDATION_SEED + i, fps=5 / 3).video for i in range(80)]),
        lambda files: files.frames(0, 240))

    def evaluate(ema):
        figures = {}
        for name, video in unseen.items():
            x = to_frames(video)[None].to(args.device)
            figures[f"held_out_psnr {name}"] = float(psnr(ema.decode(ema.encode(x)) / 2, x / 2).mean())
        return figures

    ema = run(state, frames, update, evaluate, args)
    if not args.init:
        ema.config = replace(ema.config, scale=1.0, shift=0.0)
        latents = ema.encode(replace(frames, batch=480)[10**6][0][None].to(args.device))
        deviation, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
        ema.config = replace(ema.config, scale=tuple((1 / deviation).tolist()), shift=tuple(mean.tolist()))
    return ema


# ---- Vocoder


@dataclass
class SoundBatches:
    """Sounds: [step] -> [waves (batch, S)], `seconds` long (P: 4 s), the sources taking turns."""

    batch: int
    seed: int
    seconds: float
    sample_rate: int = 16000
    sources: tuple = ("bounce",)

    def __getitem__(self, step):
        items = range(step * self.batch, (step + 1) * self.batch)
        return [torch.from_numpy(np.stack([self.sound(item) for item in items]))]

    def sound(self, item):
        source, seed = self.sources[item % len(self.sources)], clip_seed(self.seed, item, 0, 1)
        if isinstance(source, FileCache):
            return source.wave(seed, round(self.seconds * self.sample_rate))
        return WORLDS[source](seed, self.seconds, size=0, sample_rate=self.sample_rate).audio


def train_vocoder(args):
    """MelGAN with HiFi-GAN's losses (P). Before step --adversarial-from, in their place, a loss of the loud parts
    (ours), which learns tones far sooner."""
    generator = add_weight_norm(initial(Vocoder, vocoder.load, SMALL_VOCODER, args))
    config = generator.config
    discriminator = Discriminator(DiscriminatorConfig(max_channels=args.discriminator_channels)).to(args.device)
    sources = open_data(args, lambda folder, cache: cache_sounds(folder, cache, config.sample_rate))
    sounds = SoundBatches(args.batch, args.seed, args.seconds, config.sample_rate, training_share(args, sources))
    state = State({"vocoder": generator, "discriminator": discriminator}, "vocoder", args, betas=(0.8, 0.99))

    def update(state, batch):
        wave = batch[0][:, : batch[0].shape[1] // config.hop * config.hop]
        output = generator(log_mel(wave, config))
        losses = dict.fromkeys(("mel", "loud", "adversarial", "features", "critic"), math.nan)
        if state.step < args.adversarial_from:
            loud, mel = loud_stft_loss(output, wave), mel_loss(output, wave, config)
            state.descend("vocoder", loud + args.mel_weight * mel)
            return losses | {"mel": mel.detach(), "loud": loud.detach()}
        critic = discriminator_loss(discriminator(wave), discriminator(output.detach()))
        state.descend("discriminator", critic)
        with torch.no_grad():
            real = discriminator(wave)
        loss = generator_loss(real, discriminator(output), wave, output, config)
        state.descend("vocoder", loss.total)
        parts = {name: getattr(loss, name).detach() for name in ("mel", "adversarial", "features")}
        return losses | parts | {"critic": critic.detach()}

    seconds, rate = 3.2, config.sample_rate
    unseen = held_out(
        args, sources,
        lambda world: [world(VALIDATION_SEED + i, seconds, size=0, sample_rate=rate).audio for i in range(8)],
        lambda files: [files.wave(i, round(seconds * rate)) for i in range(8)])

    def evaluate(ema):
        figures = {}
        for name, waves in unseen.items():
            wave = torch.from_numpy(np.stack(waves)).to(args.device)
            with torch.no_grad():
                figures[f"held_out_mel {name}"] = float(mel_loss(ema(log_mel(wave, config)), wave, config))
        return figures

    return run(state, sounds, update, evaluate, args).folded()


# ---- The model


@dataclass
class PairBatches:
    """Windows of clips: [step] -> [latents (batch, T, C, H, W), mel (batch, M, L)] and, of the first `negatives`, the
    picture and the sound cut `shift` (from, to; s) earlier or later. 18 frames go with the first 112 mel frames (P).

    sources take turns: each is the files of a latent cache or the name of a world, whose clips are then drawn fresh and
    encoded with `vae_path`."""

    batch: int
    seed: int
    config: CMMDConfig
    front: VocoderConfig
    vae_path: str
    sources: tuple = ("bounce",)
    negatives: int = 0
    shift: tuple = (0.1, 0.4)

    def __post_init__(self):
        self.vae = None  # loaded by the process that draws the batches

    def __getitem__(self, step):
        c, rng = self.config, np.random.default_rng([self.seed, step])
        seconds, windows = c.frames / c.fps, []
        for i, clip in enumerate(self.draw(step, rng)):
            k = int(rng.integers(0, clip.T - c.frames + 1))
            moves = [0.0, 0.0] + ([self.move(rng, k, clip) for _ in range(2)] if i < self.negatives else [])
            pictures = [clip.picture(k + round(move * clip.fps), c.frames) for move in moves[::2]]
            windows.append((pictures, [clip.sound(k / clip.fps + move, seconds) for move in moves[1::2]]))
        out = []
        for which in range(2 if self.negatives else 1):  # as they are, shifted
            rows = windows[: self.negatives] if which else windows
            waves = torch.stack([sounds[which] for _, sounds in rows])
            out += [torch.stack([pictures[which] for pictures, _ in rows]), normalised_mel(waves, c, self.front)]
        return out

    def move(self, rng, k, clip):
        """Seconds, within `shift`, by which the window at frame k is cut earlier or later, where the clip goes on."""
        (low, high), room = self.shift, (k / clip.fps, (clip.T - self.config.frames - k) / clip.fps)
        sides = [sign * min(high, space) for sign, space in zip((-1, 1), room) if space > low - 1e-6]
        side = sides[rng.integers(len(sides))]
        return math.copysign(rng.uniform(min(low, abs(side)), abs(side)), side)

    def draw(self, step, rng):
        """This step's clips, long enough to be shifted -> EncodedClips."""
        c, out, fresh = self.config, [None] * self.batch, []
        for i in range(self.batch):
            source = self.sources[i % len(self.sources)]
            if source in WORLDS:
                fresh.append((i, WORLDS[source]))
            else:
                out[i] = open_encoded(source[rng.integers(len(source))])
        if fresh:
            self.vae = self.vae or vae.load(self.vae_path)
            seconds = c.frames / c.fps + (2 * self.shift[1] if self.negatives else 0)
            clips = [world(clip_seed(self.seed, step, i, self.batch), seconds, c.fps, c.size, c.sample_rate)
                     for i, world in fresh]
            for (i, _), clip in zip(fresh, encode_clips(clips, self.vae)):
                out[i] = clip
        return out


def normalised_mel(waves, config, front):
    """Waves (B, S) -> normalised mel (B, M, L)."""
    return (log_mel(waves, front) - config.mel_mean) / config.mel_std


def encode_clips(clips, autoencoder):
    """World clips -> EncodedClips in memory, all encoded at once."""
    latents = autoencoder.encode(to_frames(np.stack([clip.video for clip in clips])))
    waves = torch.from_numpy(np.stack([clip.audio for clip in clips])) * 32767
    return [EncodedClip(x, y, len(x), clip.fps, clip.sample_rate) for x, y, clip in zip(latents, waves, clips)]


def train_cmmd(args):
    """The joint model (Eq. 2): --first-lesson steps with one side clean, then the mixture (both ours); with --eta the
    joint contrastive loss (Eq. 6), with --margin its bounded form."""
    autoencoder, front = vae.load(args.vae), SMALL_VOCODER
    model = initial(CMMD, lambda path: load(path, CMMD), default_config(autoencoder, front, args), args)
    config = model.config
    state = State({"cmmd": model}, "cmmd", args)
    apart = len(args.data) if args.batch > len(args.data) else 1  # to the next clip of the same source, see PairBatches

    def update(state, batch):
        pair, shifted, first = batch[:2], batch[2:] or [x[:0] for x in batch], state.step < args.first_lesson
        times, n = negatives_first(draw_times(len(pair[0]), first, args.shares), len(shifted[0]), args)
        times, shifted = [t.to(pair[0].device) for t in times], [x[:n] for x in shifted]
        noise = [torch.randn_like(x) for x in pair]
        wrong = [draw_negatives(x[: len(y)], y, x.roll(apart, 0)[: len(y)], dim, args.kinds)
                 for x, y, dim in zip(pair, shifted, (1, 2)) if len(y)] or shifted
        loss = contrastive_loss(model, pair, times, noise, wrong, args.eta, args.margin, args.motion if first else 0.0)
        state.descend("cmmd", loss.total)
        parts = {"video": loss.positive[:, 0], "audio": loss.positive[:, 1], "wrong_audio": loss.wrong_audio.sum(dim=1),
                 "wrong_video": loss.wrong_video.sum(dim=1)}
        return {name: x.mean().detach() for name, x in parts.items() if len(x) or batch[2:]}

    unseen = [HeldOut(name, autoencoder, config, front, args.device) for name in args.data]
    evaluate = lambda ema: {f"{name} {one.name}": x for one in unseen for name, x in one.figures(ema).items()}
    negatives = round(args.negatives * args.batch) if args.eta else 0
    sources = [cached_clips(args, name, autoencoder, config) if args.clips else name for name in args.data]
    batches = PairBatches(args.batch, args.seed, config, front, args.vae, tuple(sources), negatives, tuple(args.shift))
    return run(state, batches, update, evaluate, args)


def negatives_first(times, n, args):
    """Times (B,) of video and audio, put in an order by which those where --negatives-at and --negatives-where allow
    negatives come first, and how many of the first n these are. The order says nothing: clips are drawn at random."""
    high, low = torch.maximum(*times), torch.minimum(*times)
    allowed = (high >= args.negatives_at[0]) & (high <= args.negatives_at[1])
    if args.negatives_where != "any":
        allowed &= (low == 0) == (args.negatives_where == "clean")
    order = allowed.int().argsort(descending=True, stable=True)
    return [t[order] for t in times], min(n, int(allowed.sum()))


class HeldOut:
    """Validation clips of a world, encoded, and what a model makes of them."""

    clips = 48

    def __init__(self, name, autoencoder, config, front, device):
        self.name, self.vae, self.front, seconds = name, autoencoder.to(device), front, config.frames / config.fps
        self.clips = [WORLDS[name](VALIDATION_SEED + i, seconds, config.fps, config.size) for i in range(self.clips)]
        encoded = encode_clips(self.clips, autoencoder)
        self.latents = torch.stack([clip.picture(0, config.frames) for clip in encoded]).to(device)
        self.mel = normalised_mel(torch.stack([clip.sound(0, seconds) for clip in encoded]), config, front).to(device)

    def figures(self, model, steps=8):
        """Onset F1 and pitch (of `bounce`) of sounds made for the pictures, F1 of events in pictures made for the sounds;
        each side's loss at t = 0.95, the other clean, or clean and wrong."""
        x, seeds = (self.latents, self.mel), range(len(self.mel))
        sounds = generate(model, x[0], steps=steps, seeds=seeds, window_batch=16)[1]
        out = sound_scores(model.denormalise(sounds).cpu().numpy(), self.clips, self.front)
        made = generate(model, audio=x[1], frames=x[0].shape[1], steps=steps, seeds=seeds, window_batch=16)[0]
        seen = [picture_events(frames, model.config.fps, self.name)[0] for frames in to_uint8(self.vae.decode(made))]
        out["seen_100"] = float(scores(event_counts(seen, [clip.times for clip in self.clips], 0.1).sum(0)).f1)
        high, zero = (torch.full((len(seeds),), t).to(self.mel) for t in (0.95, 0.0))
        for name, other in (("", x), ("_wrong", [y.roll(1, 0) for y in x])):
            torch.manual_seed(0)
            noise = [torch.randn_like(y) for y in x]
            with torch.no_grad():
                out["video" + name] = float(joint_loss(model, x[0], other[1], high, zero, *noise)[:, 0].mean())
                out["audio" + name] = float(joint_loss(model, other[0], x[1], zero, high, *noise)[:, 1].mean())
        return out


def cached_clips(args, name, autoencoder, config):
    """--clips clips of the world `name`, encoded once into the cache or found there -> their files."""
    folder = Path(args.cache or Path(args.out) / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    seconds = config.frames / config.fps + 2 * args.shift[1]
    kind = f"{seconds:g}s-{fingerprint(autoencoder)}"  # what another cache would differ in
    files = [folder / f"{name}-{TRAINING_SEED + i}-{kind}.safetensors" for i in range(args.clips)]
    for i in range(0, len(files), 16):
        if missing := [file for file in files[i : i + 16] if not file.exists()]:
            seeds = [int(file.stem.split("-")[1]) for file in missing]
            clips = [WORLDS[name](seed, seconds, config.fps, config.size, config.sample_rate) for seed in seeds]
            for file, clip, code in zip(missing, clips, encode_clips(clips, autoencoder)):
                write_encoded(file, code.latents, clip.audio, clip.fps, clip.sample_rate)
            if i % 512 == 0:
                print(f"{name}: encoded {i + len(missing)} of {len(files)} clips", flush=True)
    return tuple(map(str, files))


def fingerprint(autoencoder):
    """Changes with what decides about latents: the encoder, scale and shift, not the decoder."""
    weights = (w for part in (autoencoder.encoder, autoencoder.quant_conv) for w in part.state_dict().values())
    sizes = repr((autoencoder.config.scale, autoencoder.config.shift)).encode()
    return hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in weights) + sizes).hexdigest()[:8]


def default_config(autoencoder, front, args):
    """`demo` sizes for these latents and this front end, the mel's mean and deviation measured on 512 fresh sounds."""
    worlds = [WORLDS[name] for name in args.data]
    sounds = [worlds[i % len(worlds)](clip_seed(args.seed, 10**7, i, 1), size=0).audio for i in range(512)]
    mel = log_mel(torch.from_numpy(np.stack(sounds)), front)
    same = {name: getattr(front, name) for name in ("sample_rate", "n_fft", "hop", "mel_bins", "f_min", "f_max")}
    return CMMDConfig(latent_channels=autoencoder.config.latent_channels, **same,
                      mel_mean=round(float(mel.mean()), 3), mel_std=round(float(mel.std()), 3))


# ---- Command line


def initial(cls, read, default, args):
    """A fresh network, of the default sizes but for those in --config, or the weights of --init to go on from."""
    torch.manual_seed(args.seed)
    if args.init:
        return read(args.init).train().to(args.device)
    if unknown := set(args.config) - set(asdict(default)):
        raise ValueError(f"--config knows no {', '.join(sorted(unknown))}; it may hold {', '.join(asdict(default))}")
    try:
        return cls(replace(default, **args.config)).to(args.device)
    except TypeError as error:
        raise ValueError(f"--config {json.dumps(args.config)}: a value is of the wrong kind ({error})") from None


RECIPES = {  # what each training starts from; all ours but the vocoder's seconds (P)
    "vae": dict(steps=1600, batch=12, lr=1.2e-3, warmup=150, ema=0.995),
    "vocoder": dict(steps=2500, batch=1, lr=1e-3, warmup=100, ema=0.995),
    "cmmd": dict(steps=1600, batch=16, lr=1e-3, warmup=60, ema=0.997),
}
TRAININGS = {"vae": train_vae, "vocoder": train_vocoder, "cmmd": train_cmmd}


def sizes(text):
    """The argument of --config -> a dict."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError
    return content


def check(args):
    """Refuse, before any work, what cannot run."""
    for name in ("steps", "batch", "log_every", "eval_every", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")
    if args.init and args.config:
        raise ValueError("--init brings its own sizes; leave out --config")
    if args.task == "cmmd" and args.negatives_at[0] > args.negatives_at[1]:
        raise ValueError(f"--negatives-at {args.negatives_at[0]} {args.negatives_at[1]}: the lower level comes first")
    try:
        torch.zeros(1, device=args.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {args.device} cannot be used ({str(error).splitlines()[0]}); try cpu") from None


def arguments(argv):
    """The command line, with the defaults of the chosen task's recipe."""
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0], formatter_class=show)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="vae|vocoder|cmmd")
    for name, recipe in RECIPES.items():
        task = tasks.add_parser(name, formatter_class=show)
        task.add_argument("--out", required=True, help="folder for checkpoints, logs and the trained weights")
        for key, value in recipe.items():
            task.add_argument(f"--{key}", type=number(kind=type(value)), default=value)
        task.add_argument("--seed", type=SEED, default=0)
        task.add_argument("--config", type=sizes, default={}, help="sizes of the network, where not the default: JSON")
        task.add_argument("--init", help="weights to start from")
        task.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        task.add_argument("--threads", type=number(1, kind=int), help="CPU threads")
        task.add_argument("--workers", type=int, default=1, help="processes that prepare batches")
        task.add_argument("--decay", choices=("cosine", "exponential"), default="cosine", help="of the learning rate")
        task.add_argument("--gamma", type=float, default=0.999, help="exponential decay: the factor of a step")
        task.add_argument("--log-every", type=int, default=20)
        task.add_argument("--eval-every", type=int, default=400)
        task.add_argument("--save-every", type=int, default=100)
        if name != "cmmd":
            task.add_argument("--data", nargs="+", default=["bounce"], metavar="FOLDER",
                              help=f"folders of media files and worlds ({', '.join(WORLDS)}), in equal shares")
            task.add_argument("--cache", help="where their files are kept decoded (default: OUT/cache)")
        if name == "vae":
            task.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone, latents stay")
        if name == "vocoder":
            task.add_argument("--seconds", type=number(0.1), default=4.0, help="length of the crops (paper: 4)")
            task.add_argument("--adversarial-from", type=int, default=2000, help="first step with discriminators")
            task.add_argument("--mel-weight", type=float, default=0.01, help="of the mel loss before that step")
            task.add_argument("--discriminator-channels", type=int, default=256, help="at most (MelGAN's: 1024)")
        if name == "cmmd":
            task.add_argument("--data", nargs="+", default=["bounce"], choices=WORLDS, help="worlds, in equal shares")
            task.add_argument("--vae", required=True, help="weights of the autoencoder")
            task.add_argument("--first-lesson", type=int, default=400, help="steps with one side clean")
            task.add_argument("--motion", type=number(0, 1), default=0.0, help="share of the video loss's weight that "
                              "lies, in those steps, where the picture moves")
            task.add_argument("--clips", type=number(0, 10**7, int), default=0,
                              help="draw so many once and cut windows from them; 0: always fresh")
            task.add_argument("--cache", help="folder of those clips (default: OUT/cache)")
            task.add_argument("--eta", type=number(0), default=0.0, help="weight of Eq. 6's contrastive terms; 0: none")
            task.add_argument("--margin", type=number(0), help="bound them: negatives worse by this are left alone")
            task.add_argument("--negatives", type=number(0, 1), default=0.25, help="share of the batch that has them")
            task.add_argument("--negatives-at", type=number(0, 1), nargs=2, default=(0.0, 1.0), metavar="T",
                              help="only from this to that noise level, of the noisier side")
            task.add_argument("--negatives-where", choices=("any", "clean", "noisy"), default="any",
                              help="only where one side is clean, or none is")
            task.add_argument("--kinds", type=number(0), nargs=3, default=(1, 1, 1), metavar="P", help="shares of the "
                              "negatives: shift, splice, swap")
            task.add_argument("--shift", type=number(0, 60), nargs=2, default=(0.1, 0.4), metavar="S",
                              help="how far shifts go, from and to, in seconds")
            task.add_argument("--shares", type=number(0, 1), nargs=4, default=(0.2, 0.1, 0.5, 0.2), metavar="P",
                              help="then, shares of: one t, two, clean video, clean audio")
    return parser, parser.parse_args(argv)


def work(args):
    """The chosen training, whose result goes to TASK.safetensors."""
    if args.threads:
        torch.set_num_threads(args.threads)
    check(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    save(Path(args.out) / f"{args.task}.safetensors", TRAININGS[args.task](args), torch.float16)


def main(argv=None):
    """Command line; returns the exit code, 2 after one line where something is wrong."""
    parser, args = arguments(argv)
    return parser.run(work, args)


if __name__ == "__main__":
    sys.exit(main())
