"""The user's door: a video gets its sound, a sound its picture, or both are made. In this order:

  sample, Clip        clip = sample("dog.mp4"); clip.save("out.mp4")
  load_models         the three networks of a folder of weights, checked against each other
  input               paths and arrays to frames, waves, latents and mels, a chunk at a time
  the picture         frames over spectrograms, written as a PNG
  the command line    python sample.py dog.mp4 -o out.mp4; without arguments a demonstration

frames -> VAE.encode -> generate -> Vocoder.pieces -> wave; wave -> log_mel -> generate -> VAE.decode -> frames. Only
latents and small frames are kept, so that memory hardly grows with length. Letters: T video frames, C H W of the
latents, M mel bins, L mel frames, S samples.
"""

import base64
import glob
import itertools
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cmmd import (
    CMMD, CONDITIONS, REFUSED, SEED, Parser, atomic, check_sampling, data, generate, load, mel_frames, number,
    torchrun_place, usable_device)
from cmmd.vae import VAE, fingerprint, load as load_vae, to_frames, to_uint8
from cmmd.vocoder import Vocoder, VocoderConfig, load as load_vocoder, log_mel

NOTHING_LEFT = ("got both a video and a sound, so nothing is left to make; give one of them, or the stretch to make "
                "anew (make_video, make_audio)")
TYPES = (*data.VIDEO_TYPES, *data.SOUND_TYPES, ".png")
WEIGHTS = Path(__file__).resolve().parent / "weights"
SHORTEST, LONGEST = 0.01, 7_200  # seconds that may be asked for
IN_MEMORY = 2**24  # bytes of frames or of a wave; what is more waits in a file
CHUNK = 64  # frames that are read, encoded or decoded at once
TOGETHER = 8  # windows of short clips that go through the model at once
FADE = 0.01  # s; kept sound goes over into made sound within its last and first 10 ms
DEMO_SEED, DEMO_SECONDS = 7, 3.6


class Models(NamedTuple):
    """The three networks, as `load_models` returns them."""

    vae: VAE
    vocoder: Vocoder
    cmmd: CMMD

    def __repr__(self):
        """Sizes, not every layer."""
        return f"Models(vae {self.vae.config}, vocoder {self.vocoder.config}, cmmd {self.cmmd.config})"


class Clip(NamedTuple):
    """Video uint8 (T, H, W, 3) at `fps` and audio float32 (S,) at `sample_rate`, in [-1, 1] but for what overshoots in
    a sound that was given. `source` is the video file whose sound this is, if there is one."""

    video: np.ndarray
    audio: np.ndarray
    fps: float
    sample_rate: int
    source: Path | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write to .mp4 .mov .mkv .webm (a source's own picture with the new sound), .gif, .wav, .flac or .png (frames
        over the spectrogram). ValueError, in one line, for another extension or a folder that cannot be written."""
        path = data.check_output(path, TYPES)
        if path.suffix.lower() == ".png":
            write_png(path, picture(self.video, [self.audio], self.fps, self.sample_rate))
        elif self.source is not None and path.suffix.lower() in data.COPIED:
            data.add_audio(self.source, self.audio, self.sample_rate, path, len(self.audio) / self.sample_rate)
        else:
            data.write_clip(path, self.video, self.audio, self.fps, self.sample_rate)

    def __repr__(self):
        """Sizes, not numbers."""
        return (f"Clip(video {self.video.dtype} {self.video.shape} at {self.fps:g} fps, audio {self.audio.dtype} "
                f"{self.audio.shape} at {self.sample_rate} Hz, source {self.source})")

    def _repr_html_(self):
        """A player for notebooks; it shows the small frames where the source is gone, above 20 MB, or of a kind that
        .mp4 takes as it is and browsers do not play."""
        try:
            small = self.source is not None and (
                self.source.stat().st_size > 20e6 or data.probe(self.source).codec in ("hevc", "mpeg4"))
        except (OSError, ValueError):
            small = True
        with tempfile.TemporaryDirectory() as folder:
            (self._replace(source=None) if small else self).save(path := Path(folder) / "clip.mp4")
            content = base64.b64encode(path.read_bytes()).decode()
        return f'<video controls loop src="data:video/mp4;base64,{content}"></video>'


def sample(video=None, audio=None, *, seconds: float | None = None, make_video: tuple | None = None,
           make_audio: tuple | None = None, fps: float | None = None, sample_rate: int | None = None,
           steps: int | None = None, condition: str = "clean", guidance: float | None = None,
           stochasticity: float = 0.0, seed: int = 0, weights: str | os.PathLike = "worlds", device: str | None = None,
           models: Models | None = None, progress: Callable[[str, int, int], None] | None = None) -> Clip | list[Clip]:
    """Make the sound of a video, the picture of a sound, or (given neither) both -> Clip.

    video: a file, or frames (T, H, W, 3), uint8 or float in [0, 1], at `fps`. audio: a file, or a wave (S,) or
    (S, channels) in [-1, 1], at `sample_rate`. Arrays or tensors; a list of either gives a list of Clips, each as if
    alone, to rounding: short ones in a row that are equally long are made together, the faster. seconds: length of the
    clip, beyond the input's only with make_video or make_audio; 1.8 if there is no input.
    make_video, make_audio: (start, end) in seconds, end None for the clip's end: make only that stretch anew, and keep
    the rest of what is given (as the model's frames, and as its sound but for 10 ms at the borders), and, without
    audio=, of a video file's own sound. What lasts less than `seconds` goes on: its end is made too.
    steps, condition ("clean", "replace" or "guide"), guidance, stochasticity: see `cmmd.generate`; seed: another one,
    another result. weights: a name in weights/ or a folder, run on `device`, by default a GPU if there is one; models:
    what `load_models` returned, in place of both. progress: called with (what, done, of). ValueError, in one line, for
    input that cannot be used."""
    request = dict(locals())
    if models is not None and not hasattr(models, "cmmd"):
        raise ValueError(f"models is {models!r}, expected what load_models returned; names are for weights=")
    lists = {name: request[name] for name in ("video", "audio") if isinstance(request[name], (list, tuple))}
    if len(set(map(len, lists.values()))) > 1:
        raise ValueError(f"{len(video)} videos and {len(audio)} sounds: give as many of each, or one list alone")
    alone = [request | dict(zip(lists, ones)) for ones in zip(*lists.values())] if lists else [request]
    requests = [_checked(one) for one in alone]  # a wrong one is told before work begins
    models, clips = models or load_models(weights, device), []
    for clip in _made([one | {"models": models} for one in requests]):
        if isinstance(clip, Exception):
            raise clip
        clips.append(clip)
    return clips if lists else clips[0]


def _made(requests):
    """A Clip for each of the checked requests, or the exception that tells why there is none. Those in a row that are
    equally long go through the model together, as many as fill one batch of its windows."""
    read = ((request, _attempt(_read, **request)) for request in requests)
    for shape, group in itertools.groupby(read, lambda pair: _shape(pair[1])):
        most = max(1, TOGETHER * requests[0]["models"].cmmd.config.frames // shape[0]) if shape else 1
        while part := list(itertools.islice(group, most)):
            yield from _together(*zip(*part)) if shape else (part[0][1],)


def _attempt(function, *args, **settings):
    """What function(...) returns, or the exception that it raises where it refuses."""
    try:
        return function(*args, **settings)
    except REFUSED as error:
        return error


class _Given(NamedTuple):
    """What is given of a clip of T frames, read and encoded, and which stretches of it are made: see `generate`."""

    T: int
    seconds: float
    frames: np.ndarray | None
    latents: torch.Tensor | None
    wave: np.ndarray | None
    mel: torch.Tensor | None
    stretches: tuple
    keep: list
    source: Path | None


def _shape(given):
    """What clips have in common that can be made together; None of an exception."""
    if isinstance(given, Exception):
        return None
    return given.T, *(None if x is None else x.shape for x in (given.latents, given.mel, *given.keep))


def _read(video, audio, seconds, make_video, make_audio, fps, sample_rate, models, progress, **_):
    """Read and encode what is given of one clip -> _Given."""
    config = models.cmmd.config
    frames = wave = latents = mel = None
    lengths = [1.8] if video is None and audio is None else []
    if video is not None:
        frames, latents, length = _video_input(video, fps, seconds, models, progress)
        seconds = length if make_video is None else seconds
        lengths.append(length)
    if audio is not None:
        wave, mel = _audio_input(audio, sample_rate, seconds, models)
        lengths.append(len(wave) / config.sample_rate)
        wanted = seconds or (lengths[0] if audio is video else 0)  # a file's own sound may end before its picture
        if make_audio is None and make_video is not None and wanted > lengths[1] + 1 / config.fps:
            make_audio = lengths[1], None
        seconds = lengths[-1] if make_audio is None else seconds
    seconds = seconds or max(lengths)
    whole = frames is not None and make_video is None
    T = len(frames) if whole else data.frame_count(seconds, config.fps)
    stretches = _stretch("video", make_video, seconds), _stretch("audio", make_audio, seconds, lengths[-1])
    source = Path(video).absolute() if isinstance(video, (str, os.PathLike)) and whole else None
    return _Given(T, seconds, frames, latents, wave, mel, stretches, _kept(frames, mel, stretches, config), source)


def _together(requests, given):
    """Make what is missing of several equally long clips at once: yields the Clip of each, or why there is none."""
    models, tell = requests[0]["models"], requests[0]["progress"]
    join = lambda parts, how: None if parts[0] is None else how(parts)
    latents, mel = (join([getattr(one, name) for one in given], torch.cat) for name in ("latents", "mel"))
    keep = [join(masks, torch.stack) for masks in zip(*(one.keep for one in given))]
    settings = {name: requests[0][name] for name in ("steps", "condition", "guidance", "stochasticity")}
    made = _attempt(generate, models.cmmd, latents, mel, given[0].T, keep=keep, **settings,
                    seeds=[request["seed"] for request in requests], progress=lambda *a: tell("making", *a))
    if isinstance(made, Exception):
        yield from [made] * len(given)
        return
    given = [one._replace(latents=None, mel=None) for one in given]  # 20 kB for each second, no longer needed
    latents, mel = made
    drawn = [_attempt(_with_picture, one, x, models, tell) for one, x in zip(given, latents.split(1))]
    del made, latents
    mel = models.cmmd.config.denormalise(mel)
    for one, x in zip(drawn, mel.split(1)):
        yield one if isinstance(one, Exception) else _attempt(_with_sound, one, x, models)


def _with_picture(given, latents, models, tell):
    """What is given, with the frames that were, or, where any are made, those of latents (1, T, C, H, W)."""
    if given.frames is not None and not given.stretches[0]:
        return given
    chunks, size = _drawn(latents, models.vae, given.frames, given.keep[0]), models.cmmd.config.size
    frames = _on_disk(chunks, np.uint8, (size, size, 3), lambda done: tell("drawing", done, given.T))
    return given._replace(frames=frames)


def _with_sound(given, mel, models):
    """The clip with the sound that was given, or, where any is made, that of a log mel (1, M, L)."""
    wave, config = given.wave, models.cmmd.config
    if wave is None or given.stretches[1]:
        sounding = _sounding(mel, models.vocoder, wave, given.stretches[1])
        wave = _on_disk(sounding, np.float32)[: max(1, round(given.seconds * config.sample_rate))]
    else:
        wave = _on_disk([wave], np.float32)  # a copy: the caller may change it, and keep what was given
    return Clip(given.frames, wave, config.fps, config.sample_rate, given.source)


def _checked(request):
    """The arguments of `sample`, `audio` being the video file itself where its own sound is meant. ValueError, before
    anything is loaded, for what cannot work."""
    video = request["video"]
    if request["audio"] is None and isinstance(video, (str, os.PathLike)):
        if request["make_audio"] is not None or request["make_video"] is not None and data.probe(video).audio:
            request = request | {"audio": video}
    _check(**request)
    return request | {"progress": request["progress"] or (lambda *told: None)}


def _check(video, audio, seconds, make_video, make_audio, fps, sample_rate, steps, condition, guidance,
           stochasticity, seed, progress, **_):
    """Refuse what cannot work."""
    if progress is not None and not callable(progress):
        raise ValueError(f"progress is {progress!r}, expected a function of (what, done, of)")
    if video is not None and audio is not None and make_video is None and make_audio is None:
        raise ValueError(NOTHING_LEFT)
    check_sampling(steps, condition, guidance, stochasticity)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, expected a whole number from 0 to 2^63 - 1")
    if seconds is not None and not (isinstance(seconds, Real) and SHORTEST <= seconds <= LONGEST):
        raise ValueError(f"seconds is {seconds!r}, expected a length from {SHORTEST} to {LONGEST}")
    hints = {"video": "has no picture, only sound; pass it as audio= (--audio) to make its picture",
             "audio": "has no sound; give a file with a sound track"}
    for name, given, rate, unit, (low, high), make in (
            ("video", video, fps, "fps", (0.01, 1e4), make_video),
            ("audio", audio, sample_rate, "sample_rate", (100, 1e6), make_audio)):
        if make is not None and given is None:
            raise ValueError(f"make_{name} is a stretch of the {name} to make anew, but no {name} was given")
        _stretch(name, make, math.inf)
        if isinstance(given, (str, os.PathLike)):
            if not getattr(data.probe(given), name):
                raise ValueError(f"{given}: {hints[name]}")
        elif given is not None and not hasattr(given, "shape"):
            raise ValueError(f"{name} is a {type(given).__name__}, expected a file, array or tensor, or a list of them")
        elif given is not None and not (isinstance(rate, Real) and low <= rate <= high):
            raise ValueError(f"{name} as an array needs its rate: {unit}=..., from {low:g} to {high:.0f}; got {rate!r}")


def _stretch(name, make, seconds, length=math.inf):
    """make_video or make_audio -> the stretches [(start, end)] in seconds that are made in a clip of so many seconds,
    of which `length` are given; None if it is None."""
    if make is None:
        return None
    try:
        start, end = (float(math.inf if x is None else x) for x in make)
    except (TypeError, ValueError):
        start = end = math.nan
    if not 0 <= start < end:
        raise ValueError(f"make_{name} is {make!r}, expected (start, end) in seconds from the clip's start")
    if start >= seconds:
        raise ValueError(f"make_{name} begins at {start:g} s, the clip ends at {seconds:g} s: nothing is left to make")
    return [(start, end)] + ([(length, math.inf)] if length < seconds - 1e-6 else [])


def _apart(times, stretches):
    """How far from the nearest of the stretches [(start, end)] times are, 0 within; all in seconds."""
    return np.min([np.maximum(np.maximum(start - times, times - end), 0) for start, end in stretches], axis=0)


def _kept(frames, mel, stretches, config):
    """What `generate` keeps of frames and mel: those in which nothing is seen or heard of the stretches to make."""
    keep, window = [None, None], config.n_fft / config.sample_rate
    if stretches[0]:
        times = (np.arange(len(frames)) + 0.5) / config.fps
        keep[0] = torch.from_numpy(_apart(times, stretches[0]) > 0.5 / config.fps - 1e-6)
    if stretches[1]:
        times = (np.arange(mel.shape[2]) + 0.5) * config.hop / config.sample_rate
        keep[1] = torch.from_numpy(_apart(times, stretches[1]) >= window / 2)
    return keep


def load_models(weights: str | os.PathLike = "worlds", device: str | None = None) -> Models:
    """The networks of a folder with vae, vocoder and cmmd.safetensors, or of a name in weights/ -> Models on `device`.

    The first two may be published weights: see `load` in vae.py and vocoder.py. ValueError, in one line, if files are
    missing or of another kind, or if their mels or latents do not fit."""
    known = sorted(p.name for p in WEIGHTS.iterdir() if p.is_dir()) if WEIGHTS.is_dir() else []
    folder = WEIGHTS / weights if str(weights) in known else Path(str(weights))
    if not str(weights) or not folder.is_dir():
        raise ValueError(f"{weights}: no such folder of weights; give one, or a name of {', '.join(known) or '(none)'}")
    device = usable_device(device)
    networks = Models(load_vae(folder / "vae.safetensors"), load_vocoder(folder / "vocoder.safetensors"),
                      load(folder / "cmmd.safetensors", CMMD))
    _check_fit(folder, *networks)
    return Models(*(module.to(device).requires_grad_(False) for module in networks))


def _check_fit(folder, vae, vocoder, model):
    """Refuse networks that were not made for each other."""
    for name in ("sample_rate", "n_fft", "hop", "mel_bins", "f_min", "f_max"):
        theirs, ours = getattr(vocoder.config, name), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"{folder / 'vocoder.safetensors'}: its {name} is {theirs}, the model's is {ours}; "
                             "take the vocoder that the model was trained with")
    ours, theirs = model.config, vae.config
    if theirs.latent_channels != ours.latent_channels or theirs.factor != 8:
        raise ValueError(f"{folder / 'vae.safetensors'}: {theirs.latent_channels} channels, 1/{theirs.factor} size; "
                         f"the model wants {ours.latent_channels} for frames of {ours.size} px")
    if ours.latents and ours.latents != fingerprint(vae):
        raise ValueError(f"{folder / 'vae.safetensors'}: its encoder, scale or shift are not those that the model was "
                         "trained with; take the autoencoder that was its --vae")


# ---- Input


def _video_input(video, fps, seconds, models, tell):
    """A video file or array -> frames uint8 (T, size, size, 3), latents (1, T, C, H, W), length in seconds."""
    config, device = models.cmmd.config, next(models.vae.parameters()).device
    if isinstance(video, (str, os.PathLike)):
        chunks = data.Video(video, config.fps, config.size, seconds=seconds, chunk=CHUNK)
        whole = min(chunks.seconds or 0.0, seconds or math.inf)
    else:
        chunks, whole = _array_chunks(video, fps, seconds, config)
    latents = bytearray()  # one block that grows: many small ones would keep the memory between them from going back

    def encode(part):
        made = models.vae.encode(to_frames(part.copy())[None].to(device))  # (1, n, C, H, W)
        latents.extend(made.cpu().numpy().tobytes())
        return part

    frames = _on_disk(map(encode, chunks), np.uint8, (config.size, config.size, 3),
                      lambda done: tell("reading", done, max(done, round(whole * config.fps))))
    side = config.size // models.vae.config.factor
    latents = torch.frombuffer(latents, dtype=torch.float32).reshape(1, len(frames), -1, side, side)
    return frames, latents.to(device), getattr(chunks, "seconds", whole)


def _on_disk(chunks, kind, shape=(), tell=lambda done: None):
    """Chunks (n, *shape), as type `kind` -> all of them (T, *shape), in a temporary file without a name if they are
    large, so that they take no memory before somebody looks at them. tell(T so far) is called after each chunk."""
    with tempfile.TemporaryFile() as file:
        for part in chunks:
            file.write(np.ascontiguousarray(part, dtype=kind))
            tell(file.tell() // (math.prod(shape) * np.dtype(kind).itemsize))
        if file.tell() > IN_MEMORY:
            file.flush()
            return np.memmap(file, kind, "c").reshape(-1, *shape)  # changes to it stay in memory
        file.seek(0)  # a map would hold a file open for as long as its clip lives: a list of hundreds has too many
        return np.frombuffer(bytearray(file.read()), kind).reshape(-1, *shape)


def _drawn(latents, vae, given, kept):
    """Latents (1, T, C, H, W) -> chunks of frames uint8 (n, size, size, 3), the kept ones as they were given."""
    for k, part in enumerate(latents.split(CHUNK, 1)):
        frames = to_uint8(vae.decode(part)[0])
        if kept is not None:
            here = np.flatnonzero(kept[k * CHUNK :][: len(frames)])
            frames[here] = given[k * CHUNK + here]
        yield frames


def _sounding(mel, vocoder, given, stretches):
    """Mel (1, M, L) -> chunks of its wave (n,); outside the stretches that are made, what was given, faded over."""
    start = 0
    for piece in vocoder.pieces(mel):
        wave = piece[0].cpu().numpy()
        if given is not None:
            times = (np.arange(start, start + len(wave)) + 0.5) / vocoder.config.sample_rate
            share, known = np.minimum(_apart(times, stretches) / FADE, 1), given[start : start + len(wave)]
            wave = share * np.pad(known, (0, len(wave) - len(known))) + (1 - share) * wave
        start += len(wave)
        yield wave


def _array_chunks(video, fps, seconds, config):
    """Frames (T, H, W, 3) at `fps` -> chunks of uint8 frames at the model's rate and size, and their length in seconds.

    The frame on screen and the centre square, as `data.Video` takes them."""
    video = _array(video)
    known = video.dtype == np.uint8 or video.dtype.kind == "f"
    if video.ndim != 4 or video.shape[3] != 3 or not video.size or not known:
        raise ValueError(f"video: expected (T, H, W, 3), uint8 or float in [0, 1], got {video.dtype} {video.shape}")
    if video.dtype.kind == "f" and not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(f"video: float frames must lie in [0, 1], got {video.min():.3g} to {video.max():.3g}")
    length = min(len(video) / fps, seconds or math.inf)
    times = (np.arange(data.frame_count(length, config.fps)) + 0.5) / config.fps
    index = np.clip(np.ceil((times - data.TIE) * fps).astype(int) - 1, 0, len(video) - 1)
    _, H, W, _ = video.shape
    side = min(H, W)
    square = video[:, (H - side) // 2 :, (W - side) // 2 :][:, :side, :side]
    return (_resize(square[index[k : k + CHUNK]], config.size) for k in range(0, len(index), CHUNK)), length


def _array(x):
    """An array, or a tensor from wherever it lies -> an array that numpy can work on."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x  # numpy has no bf16
    return np.asarray(x)


def _resize(frames, size):
    """Frames uint8 or float in [0, 1] (n, side, side, 3) -> uint8 (n, size, size, 3)."""
    x = np.ascontiguousarray(frames, dtype=None if frames.dtype == np.uint8 else np.float32)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    x = x * 255 if frames.dtype.kind == "f" else x
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _audio_input(audio, sample_rate, seconds, models):
    """A sound file or array -> wave float32 (S,) at the model's rate, normalised mel (1, M, L) of its whole canvas."""
    config, device = models.cmmd.config, next(models.cmmd.parameters()).device
    if isinstance(audio, (str, os.PathLike)):
        wave = data.read_audio(audio, config.sample_rate, seconds=seconds)
    else:
        wave = _array_wave(audio, sample_rate, config.sample_rate)
    wave = wave[: round(seconds * config.sample_rate)] if seconds else wave
    T = data.frame_count(len(wave) / config.sample_rate, config.fps)
    canvas = np.pad(wave, (0, max(0, mel_frames(T, config) * config.hop - len(wave))))
    mel = log_mel(torch.from_numpy(canvas)[None].to(device), models.vocoder.config)[..., : mel_frames(T, config)]
    return wave, models.cmmd.config.normalise(mel)


def _array_wave(audio, sample_rate, wanted):
    """A wave (S,) or (S, channels), float in [-1, 1] or int16, at `sample_rate` -> float32 (S,) at rate `wanted`."""
    import soundfile

    audio = _array(audio)
    whole = audio.dtype.kind == "i" and audio.dtype.itemsize == 2
    known = audio.dtype.kind == "f" or whole
    if audio.ndim not in (1, 2) or not audio.size or not known or audio.ndim == 2 and audio.shape[1] > 64:
        raise ValueError(f"audio: expected (S,) or (S, channels), float or int16, got {audio.dtype} {audio.shape}")
    wave = audio / 32768 if whole else audio
    if len(wave) * wanted < sample_rate:
        raise ValueError(f"audio: {len(wave)} samples at {sample_rate:g} Hz are less than one at {wanted}; give more")
    if not np.abs(wave).max() <= 2:  # resampling and lossy codecs overshoot a little; NaN is caught too
        raise ValueError(f"audio: float waves must lie in [-1, 1], got {wave.min():.3g} to {wave.max():.3g}")
    wave = np.ascontiguousarray(wave.mean(1) if wave.ndim == 2 else wave, dtype=np.float32)
    if sample_rate == wanted:
        return wave
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(Path(folder) / "a.wav", wave, round(sample_rate), subtype="FLOAT")
        return data.read_audio(Path(folder) / "a.wav", wanted)


# ---- The picture

GLYPHS = {"0": 31599, "1": 11415, "2": 29671, "3": 29647, "4": 23497, "5": 31183, "6": 31215, "7": 29257, "8": 31727,
          "9": 31695, ".": 2, "s": 1934}  # 3 x 5 dots, row by row, the first the highest bit
COLOURS = np.array([(0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)])


def picture(video, waves, fps, sample_rate, times=(), width=960):
    """Frames (T, H, W, 3) over the spectrogram of each wave (S,), a time axis below -> uint8 (height, width, 3).

    All waves but the first may also be log mels (M, L). White lines through all of it mark `times` (s)."""
    seconds, count = len(waves[0]) / sample_rate, 12
    side = width // count
    shown = np.clip(((np.arange(count) + 0.5) / count * seconds * fps).astype(int), 0, len(video) - 1)
    strip = np.concatenate([_resize(video[k][None], side)[0] for k in shown], 1)
    gap = np.full((6, width, 3), 255, np.uint8)
    rows = [strip]
    for wave in waves:
        rows += [gap, _spectrogram(wave, sample_rate, width)]
    image = np.concatenate(rows)
    for x in (int(t / seconds * width) for t in times if 0 <= t < seconds):
        image[side:, x] = np.where(np.arange(len(image) - side)[:, None] % 6 < 3, 255, image[side:, x])
        for dy in range(8):  # a triangle that points at the event
            image[side + dy - 2, max(0, x - 4 + dy // 2) : x + 5 - dy // 2] = (220, 30, 30)
    return np.concatenate([image, _axis(seconds, width)])


def _spectrogram(wave, sample_rate, width, height=160):
    """The log mel of a wave, or a log mel, in colours, low pitch at the bottom -> uint8 (height, width, 3)."""
    config = VocoderConfig(sample_rate=sample_rate, f_max=sample_rate / 2)
    mel = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))[None]
    if wave.ndim == 1:
        mel = log_mel(F.pad(mel, (0, max(0, config.n_fft - len(wave)))), config)  # (1, S) -> (1, M, L)
    mel = F.adaptive_max_pool1d(mel, min(width, mel.shape[2]))
    mel = F.interpolate(mel[None], (height, width))[0, 0].flip(0).numpy()
    level = np.clip((mel + 4.5) / 4.5, 0, 1) * (len(COLOURS) - 1)
    return np.stack([np.interp(level, range(len(COLOURS)), c) for c in COLOURS.T], -1).astype(np.uint8)


def _axis(seconds, width, height=24, dot=2):
    """A time axis: ticks at round times with their seconds -> uint8 (height, width, 3)."""
    axis = np.full((height, width, 3), 255, np.uint8)
    step = next(s for k in range(-2, 6) for s in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if seconds / s <= 12)
    for n in range(int(seconds / step + 1e-9) + 1):
        x = min(width - 2, int(n * step / seconds * width))
        axis[:5, x : x + 2] = 0
        label = f"{n * step:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}s"
        x = int(np.clip(x - 4 * dot * len(label) // 2, 0, width - 4 * dot * len(label)))
        for glyph in label:
            bits = np.array([int(b) for b in f"{GLYPHS[glyph]:015b}"], bool).reshape(5, 3)
            axis[8 : 8 + 5 * dot, x : x + 3 * dot][np.kron(bits, np.ones((dot, dot), bool))] = 0
            x += 4 * dot
    return axis


def write_png(path, image):
    """Write an image uint8 (H, W, 3) as a PNG, whole or not at all."""
    from imageio import v3 as imageio

    with atomic(path) as whole:
        imageio.imwrite(whole, image, extension=".png")


# ---- The command line


def demo(folder=".", **settings):
    """Make the sound of a held-out clip of the world `bounce`: demo.mp4, and demo.png with the true impacts marked."""
    outputs = [data.check_output(Path(folder) / name, TYPES) for name in ("demo.mp4", "demo.png")]
    world = data.bounce(DEMO_SEED, seconds=DEMO_SECONDS, fps=25, size=256)
    with tempfile.TemporaryDirectory() as spare:
        silent = Path(spare) / "bounce.mp4"
        data.write_clip(silent, world.video, fps=world.fps)
        clip = sample(silent, **settings)
        clip.save(outputs[0])
    S = min(len(clip.audio), len(world.audio))
    image = picture(clip.video, [world.audio[:S], clip.audio[:S]], clip.fps, clip.sample_rate, world.times)
    write_png(outputs[1], image)
    return (f"{outputs[0]}: {DEMO_SECONDS} s of bouncing balls that no training saw, with their generated sound\n"
            f"{outputs[1]}: frames, true sound, generated sound; {len(world.times)} impacts marked, at "
            + " ".join(f"{t:.2f}" for t in world.times) + " s")


def _arguments(argv):
    parser = Parser(prog=Path(sys.argv[0]).name if "sample" in sys.argv[0] else "sample.py", description=
                    "Make the sound of videos, the picture of a sound (--audio), or both (--seconds alone). "
                    "Without any argument: a demonstration, demo.mp4 and demo.png. Under torchrun each process takes "
                    "its share of the files.")
    parser.add_argument("video", nargs="*", help="video files that get a sound")
    parser.add_argument("-o", "--output", help="file to write, " + " ".join(TYPES) + ", or a folder, which several "
                        "inputs need: NAME.mp4 in it (default: NAME-cmmd.mp4 here)")
    parser.add_argument("--skip-existing", action="store_true", help="leave out what is already there")
    parser.add_argument("--audio", nargs="+", help="sound files, or videos with sound, that get a picture")
    parser.add_argument("--seconds", type=float, help="length, beyond the input's only with "
                        "--make-video or --make-audio (default: the input's)")
    for name, whose in (("video", "picture"), ("audio", "sound, by default the video's own")):
        parser.add_argument(f"--make-{name}", type=float, nargs=2, metavar=("START", "END"), help="make only this "
                            f"stretch (in seconds; inf: to the end) of the {whose}, and keep the rest")
    parser.add_argument("--weights", default="worlds", help="name in weights/, or a folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 3 for sounds, 8 for pictures; where "
                        "both are made 10, then these at each turn; replace and guide: 10, for both 25)")
    parser.add_argument("--condition", default="clean", choices=CONDITIONS, help="how what is given enters; where "
                        "nothing is, all make both at once, and clean goes on by turns")
    parser.add_argument("--guidance", type=number(), help="strength of the guidance (default: the condition's own)")
    parser.add_argument("--stochasticity", type=number(0, 1), default=0.0, help="share of the noise that is drawn "
                        "anew at every step; 0: DDIM (default: %(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="another seed, another result (default: %(default)s)")
    parser.add_argument("--draws", type=number(1, 10_000, int), help="make so many of each, with SEED, SEED + 1 ...: "
                        "OUT.0.mp4, OUT.1.mp4 ...")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return parser, parser.parse_args(argv)


def _jobs(args):
    """What the command line asks for -> [(video, audio, output)], checked; none for the demonstration."""
    if args.video and args.audio and not (args.make_video or args.make_audio):
        raise ValueError(NOTHING_LEFT)
    if args.video and args.audio and len(args.audio) > 1:
        raise ValueError(f"{len(args.audio)} sounds beside videos: give one, or make them one by one")
    given = [name for one in args.video or args.audio or [] for name in _matching(one)] or [None]
    if given == [None] and args.seconds is None:
        if args.output is not None or args.draws or args.make_video or args.make_audio:
            raise ValueError("nothing to make: give a video, --audio or --seconds (or nothing, for the demonstration)")
        return []
    if args.output and (len(given) > 1 or not Path(args.output).suffix):
        if Path(args.output).suffix.lower() in TYPES or Path(args.output).is_file():
            raise ValueError(f"{args.output}: {len(given)} files need a folder to write to, this is a file's name")
        if not Path(args.output).absolute().parent.is_dir():
            raise ValueError(f"{args.output}: cannot be made, the folder that it lies in does not exist; make it first")
        Path(args.output).mkdir(exist_ok=True)
    outputs = [_output(one, args.output) for one in given]
    inputs = [Path(one) for one in (*given, *(args.audio or ())) if one]
    read = {path.stat()[1:3] for path in inputs if path.exists()}  # inode and device tell a file, by whatever name
    seen = set()
    for output in outputs:
        data.check_output(output, TYPES)
        for path in _draws(output, args.draws):
            if path.exists() and not args.skip_existing and path.stat()[1:3] in read:
                raise ValueError(f"{path}: is the input itself; choose another file to write")
        if output in seen:
            raise ValueError(f"{output}: would be the output of several inputs; give them different names")
        seen.add(output)
    beside = args.audio and args.audio[0]
    return [(one, beside, output) if args.video else (None, one, output) for one, output in zip(given, outputs)]


def _draws(output, draws):
    """The files that are written for one output: itself, or OUT.0.mp4, OUT.1.mp4 ... of so many draws."""
    return [output.with_suffix(f".{k}{output.suffix}") for k in range(draws)] if draws else [output]


def _matching(name):
    """The files that a pattern like *.mp4 means, where the shell leaves that to the program, as on Windows."""
    return [name] if os.path.exists(name) else sorted(glob.glob(name)) or [name]


def _output(source, wanted):
    """Where to write what is made for the file `source` (None: for nothing), `wanted` a file, a folder or None."""
    folder = Path(wanted or ".")
    if not folder.is_dir():
        return folder
    if source is None:
        return folder / "out.mp4"
    beside = folder.resolve() == Path(source).resolve().parent or wanted is None
    return folder / f"{Path(source).stem}{'-cmmd' * beside}.mp4"


def _make(parser, args):
    """Do what the command line asks for, a line for each result, also for what fails -> exit status."""
    jobs = _jobs(args)
    rank, ranks, gpu = torchrun_place()
    device = args.device or (f"cuda:{gpu}" if torch.cuda.is_available() else None)
    settings = {name: getattr(args, name) for name in ("steps", "condition", "guidance", "stochasticity", "seed")}
    settings |= {"models": load_models(args.weights, device), "progress": _progress if sys.stderr.isatty() else None}
    if not jobs:
        return print(demo(**settings)) if rank == 0 else None
    settings |= {name: getattr(args, name) for name in ("seconds", "make_video", "make_audio")}
    requests, paths = [], []

    def ask(video, audio, output):
        wanted = dict(enumerate(_draws(output, args.draws), args.seed))  # by seed
        for seed, path in list(wanted.items()) if args.skip_existing else ():
            if path.exists():
                print(f"{path}: is already there", flush=True)
                del wanted[seed]
        if wanted:  # the highest seed stands for all
            request = settings | {"video": video, "audio": audio, "fps": None, "sample_rate": None}
            request = _checked(request | {"seed": max(wanted)})
            requests.extend(request | {"seed": seed} for seed in wanted)
            paths.extend(wanted.values())

    asked = [parser.run(ask, *job) for job in jobs[rank::ranks]]  # what is wrong is told before work begins
    done = [parser.run(_write, *one) for one in zip(_made(requests), paths)]
    return max([*asked, *done], default=0) if ranks == 1 else 0  # torchrun would stop the others, at work


def _write(clip, path):
    """Write a clip, and tell; raise what stands in a clip's place."""
    if isinstance(clip, Exception):
        raise clip
    clip.save(path)
    print(f"{path}: {len(clip.audio) / clip.sample_rate:.1f} s", flush=True)


def _progress(what, done, of):
    print(f"\r{what} {done}/{of}   ", end="\n" if done >= of else "", file=sys.stderr, flush=True)


def main(argv=None):
    """The command line; returns the exit code: 0, or 2 after a line for each thing that is wrong."""
    parser, args = _arguments(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"{parser.prog}: warning: {message}", file=sys.stderr)
        return parser.run(_make, parser, args)


if __name__ == "__main__":
    sys.exit(main())
