"""Media in and out, and synthetic worlds. In this order:

  what a file holds   Media, probe: its streams, length and start; check_output: can this path be written
  reading             Video (a file's frames, chunk by chunk), read_video, read_audio
  writing             write_clip (frames and sound), add_audio (a file's own picture with a new sound)
  encoded clips       latents and wave of a clip in one file, read by slice: write_encoded, open_encoded
  worlds              procedural clips whose event times are known: bounce (impacts), dance (beats)
  sources             what train.py's --data may name: folders, and the lists of AIST++ and EPIC-Sounds
  caches              every source decoded once, then read by slice: frames, sounds, encoded clips

Media are read, and videos written, by the ffmpeg binary that imageio-ffmpeg brings, so whatever it reads, we read; it
crops and scales, so that no whole file is ever held at full size. A clip starts where its picture starts, or, if it has
none, where its sound starts; all times are in seconds from there.

Letters: T video frames, H W height and width, S samples. Frames are uint8 (T, H, W, 3), waves float32 (S,) in [-1, 1].
"""

import csv
import functools
import itertools
import math
import os
import random
import re
import subprocess
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cmmd import atomic, remove_unfinished, write_tensors

VIDEO_TYPES = {  # by extension: codec of the picture, codec of the sound, what else the format wants
    ".mp4": ("libx264 -crf 18 -preset fast", "aac -ar 48000 -b:a 128k", "-movflags +faststart"),
    ".mov": ("libx264 -crf 18 -preset fast", "aac -ar 48000 -b:a 128k", "-movflags +faststart"),
    ".mkv": ("libx264 -crf 18 -preset fast", "libopus -b:a 96k", ""),
    ".webm": ("libvpx-vp9 -crf 24 -b:v 0 -deadline realtime -cpu-used 6 -row-mt 1", "libopus -b:a 96k", ""),
    ".gif": ("gif", "", ""),
}
SOUND_TYPES = (".wav", ".flac")
COPIED = {  # pictures that each container takes as they are; any other is encoded anew
    ".mp4": ("h264", "hevc", "av1", "mpeg4", "vp9"),
    ".mov": ("h264", "hevc", "mpeg4", "prores", "mjpeg"),
    ".mkv": ("h264", "hevc", "av1", "mpeg4", "vp8", "vp9", "mpeg2video", "mpeg1video", "mjpeg", "prores", "ffv1"),
    ".webm": ("vp8", "vp9", "av1"),
}
NO_TIME = -(2**63)  # what ffmpeg prints for a packet without a time
LOUDEST = 10  # lossy codecs overshoot 1 by a little; what is louder is no wave in [-1, 1], but another scale
TIE = 0.0005  # s; a change of frames this near to a sampled time is at it: containers round times to 1 ms


# ---- What a file holds


class Media(NamedTuple):
    """What `probe` found: seconds (by the header; None where it does not say), is there a picture, a sound, the
    picture's codec (None without one), does it carry a rotation, the clip's start on the file's own clock, and its
    frames a second (the mean; None where there is no telling)."""

    seconds: float | None
    video: bool
    audio: bool
    codec: str | None
    rotated: bool
    start: float
    fps: float | None


def probe(path):
    """What the media file at `path` holds -> Media. Of several streams the first counts; cover art is no picture.

    ValueError, in one line, if there is no such file or nothing in it that decodes."""
    path = _existing(path)
    text = _first_frame(path, "v")
    line = r"(?m)^\[info\] +"  # a line's start, where no tag of the file stands
    stream = line + r"Stream #0:\d+\S*: "
    pictures = re.findall(stream + r"Video: (?!none)(\w+)(?!.*attached pic)(?:.*?, ([\d.]+k?) fps)?", text)
    sound = re.search(stream + r"Audio: (?!none)", text) is not None
    if re.search(r"(?m)^\[info\] Input #0, tty", text) or not re.search(stream, text):
        raise ValueError(f"{path}: no media file, or its header is damaged or cut off ({_reason(text)}); "
                         "give a video or sound file that plays, or copy it again")
    if not pictures and not sound:
        raise ValueError(f"{path}: holds neither a picture nor a sound; give a video or sound file")
    started = text if pictures else _first_frame(path, "a")
    start = re.search(r"showinfo.* n: *0 pts: *(-?\d+|NOPTS)", started)
    if start is None:
        raise ValueError(f"{path}: its {'picture' if pictures else 'sound'} cannot be decoded ({_reason(started)}); "
                         "give a file that plays, or copy it again")
    length = re.search(line + r"Duration: (\d+):(\d+):([\d.]+)", text)
    seconds = sum(float(n) * unit for n, unit in zip(length.groups(), (3600, 60, 1))) if length else None
    codec, rate = pictures[0] if pictures else (None, "")
    rotated = re.search(line + r"\S* ?[Mm]atrix: rotation of", text) is not None
    return Media(seconds, bool(pictures), sound, codec, rotated,
                 0.0 if start[1] == "NOPTS" else int(start[1]) / 1e6, float(rate.replace("k", "e3")) if rate else None)


def _first_frame(path, kind):
    """What ffmpeg says about a file and its first frame of kind "v" (pictures) or "a" (sounds)."""
    show = "settb=1/1000000,showinfo" if kind == "v" else "asettb=1/1000000,ashowinfo"
    stream = ["-map", "0:V:0?" if kind == "v" else "0:a:0", f"-{kind}f", show, f"-frames:{kind}", "1"]
    return _run(["-copyts", *_source(path), *stream, "-f", "null", "-"], check=False).stderr.decode(errors="replace")


def check_output(path, types):
    """Path(path) if it ends in one of `types` and its folder can be written, else ValueError in one line."""
    path = Path(path)
    if path.suffix.lower() not in types:
        raise ValueError(f"{path}: cannot write files of type {path.suffix or '(none)'!r}; use {' '.join(types)}")
    try:
        with atomic(path):
            raise LookupError  # the folder takes files: leave it, and the path, as they were
    except LookupError:
        return path


def _existing(path):
    """Path(path), or ValueError if no file of any content is there."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give one video or sound file")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        reason = "there is no such file" if not path.exists() else f"cannot be read ({error.strerror})"
        raise ValueError(f"{path}: {reason}; check the path") from None
    if not head:
        raise ValueError(f"{path}: is empty (0 bytes); copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a git-LFS pointer, not the file itself; fetch it with: git lfs pull")
    return path


# ---- Reading


class Video:
    """A file's frames at `fps`: iterate for chunks uint8 (n, size, size, 3), n <= chunk; `seconds` is exact afterwards.

    Frame k is the source frame on screen at (k + 1/2)/fps after the clip's start (the earlier of two that meet there),
    whatever the source's rate, constant or not; there are ceil(seconds * fps). Rotation is applied, pixels are square,
    the centre square is cropped. `start` and `seconds` (s) choose a stretch. What cannot be decoded is replaced by the
    nearest frames, with a warning that says how much is missing. ValueError, in one line, for what has no picture."""

    def __init__(self, path, fps=10, size=64, start=0.0, seconds=None, chunk=64):
        _check_stretch(start, seconds, fps, size)
        self.path, self.fps, self.size, self.start, self.chunk, self.limit = path, fps, size, start, chunk, seconds
        self.media = probe(path)
        if not self.media.video:
            raise ValueError(f"{path}: has no picture, only sound; give a video file, or pass it as audio")
        self.seconds = self.media.seconds  # by the header, until the frames have been read

    def __iter__(self):
        frames = self._sampled()
        while chunk := list(itertools.islice(frames, self.chunk)):
            yield np.frombuffer(bytearray().join(chunk), np.uint8).reshape(-1, self.size, self.size, 3)

    def _sampled(self):
        """Yield the bytes of frame 0, 1, ...: each source frame lasts until the next one's time."""
        log, k, end, missing, last = {"errors": 0, "damaged": 0}, 0, 0.0, 0.0, None
        most = math.inf if self.limit is None else frame_count(self.limit, self.fps)
        for time, duration, frame in _decode(self.path, self.media, self.size, self.start, log):
            if last is not None:
                missing += max(0.0, time - end) if time > max(end, 0.0) + 0.5 * duration else 0.0
                while k < most and (k + 0.5) / self.fps <= time + TIE:
                    yield last
                    k += 1
                if k == most and time >= self.limit - TIE:
                    break
            last, end = frame, time + (duration or 1 / self.fps)
        if last is None or end <= 0:
            raise ValueError(f"{self.path}: no picture from {self.start:g} s on; it is {self.seconds or 0:g} s long")
        whole = self.media.seconds - self.start if self.media.seconds and k < most else end
        self.seconds = end if self.limit is None else min(end, self.limit)
        for _ in range(k, max(1, frame_count(self.seconds, self.fps))):
            yield last
        _warn(self.path, "picture", log, missing + max(0.0, whole - end), max(whole, end))


def read_video(path: str | os.PathLike, fps: float = 10, size: int = 64, start: float = 0.0,
               seconds: float | None = None) -> np.ndarray:
    """All frames of a video file, as `Video` samples them -> uint8 (T, size, size, 3), T = ceil(duration * fps)."""
    return np.concatenate(list(Video(path, fps, size, start, seconds)))


def read_audio(path: str | os.PathLike, sample_rate: int = 16000, start: float = 0.0,
               seconds: float | None = None) -> np.ndarray:
    """The sound of a video or sound file, mixed to one channel -> float32 (S,), read-only, at sample_rate, in [-1, 1]
    but for the overshoots of lossy codecs.

    It starts where the clip does: silence stands where a picture starts before its sound and in gaps. `start` and
    `seconds` choose a stretch. ValueError, in one line, for a file without sound."""
    _check_stretch(start, seconds, sample_rate)
    media = probe(path)
    if not media.audio:
        raise ValueError(f"{path}: has no sound; give a file with a sound track")
    filters = (f"asetpts=PTS-({media.start + start:.6f})/TB,"
               f"aresample={sample_rate}:async=1:first_pts=0:rematrix_maxval=1,aformat=channel_layouts=mono")
    stretch = [] if seconds is None else ["-t", f"{seconds:.6f}"]
    result = _run(["-copyts", *_source(path, start), "-map", "0:a:0", "-af", filters, *stretch, "-f", "f32le",
                   "pipe:1"], check=False)
    _finished(path, result.returncode)
    wave = np.frombuffer(result.stdout, np.float32)
    peak = max(wave.max(initial=0), -wave.min(initial=0))  # no copy: an hour is 230 MB
    if not peak <= LOUDEST:  # NaN is caught too
        raise ValueError(f"{path}: its sound reaches {peak:.3g}, a wave lies in [-1, 1]; scale it or copy it again")
    errors = result.stderr.count(b"[error]")
    if not len(wave):
        reason = f"cannot be decoded ({_reason(result.stderr.decode(errors='replace'))})" if errors else "is empty"
        raise ValueError(f"{path}: its sound {reason}, from {start:g} s on; give a file that plays")
    whole = min(media.seconds - start, seconds or math.inf) if media.seconds else 0.0
    got = len(wave) / sample_rate
    _warn(path, "sound", {"errors": errors, "damaged": 0}, max(0.0, whole - got), max(whole, got))
    return wave


def _check_stretch(start, seconds, rate, size=1):
    """Refuse what is no stretch of a file."""
    lengths = (rate, 1 if seconds is None else seconds)
    if not all(0 < x < math.inf for x in lengths) or not 1 <= size < math.inf or not 0 <= start < math.inf:
        raise ValueError(f"rate {rate}, size {size}, seconds {seconds} must be above 0 and start {start} not below, "
                         "all of them finite")


def frame_count(seconds, fps):
    """ceil(seconds * fps), forgiving 1 % of a frame: times in files are rounded."""
    return max(1, math.ceil(seconds * fps - 0.01))


def _decode(path, media, size, start, log):
    """Yield (time after `start` in s, duration in s, rgb24 bytes) of every frame; `log` counts errors and damage."""
    filters = ("settb=1/1000000,crop=w='max(1,min(iw,ih/sar))':h='max(1,min(ih,iw*sar))':exact=1,"
               f"scale={size}:{size}:flags=area+accurate_rnd+full_chroma_int,format=rgb24,showinfo=checksum=0")
    command = _ffmpeg(["-copyts", *_source(path, start), "-map", "0:V:0", "-vf", filters, "-fps_mode", "passthrough",
                       "-enc_time_base", "1/1000000", "-f", "rawvideo", "pipe:1"])
    shown, wanted, pipe = Queue(), size * size * 3, subprocess.PIPE
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    reader = threading.Thread(target=_listen, args=(process.stderr, shown, log), daemon=True)
    reader.start()
    end = 0.0
    try:
        while len(frame := process.stdout.read(wanted)) == wanted and (times := shown.get()) is not None:
            time = end if times[0] is None else times[0] / 1e6 - media.start - start
            end = time + times[1] / 1e6
            yield time, times[1] / 1e6, frame
        _finished(path, process.wait())
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


def _listen(stderr, shown, log):
    """Put each frame's (time or None, duration) in microseconds, as ffmpeg's showinfo prints it, into `shown`."""
    for line in stderr:
        found = re.search(rb"\] n: *\d+ pts: *(-?\d+|NOPTS).*?(?:duration: *(\d+)|$)", line)
        if found:
            shown.put((None if found[1] == b"NOPTS" else int(found[1]), int(found[2] or 0)))
        log["damaged"] += b"corrupt decoded frame" in line
        told = b"[error]" in line or b"ended prematurely" in line  # which another thread's line may have cut in two
        log["errors"] += told and b"[rawvideo" not in line
    shown.put(None)


def _warn(path, what, log, missing, whole):
    """Warn how much is missing or damaged, if decoding met errors. A gap alone is no fault: frame rates vary."""
    if log["errors"] and (missing > 0.02 or log["damaged"]):
        damaged = f" and {log['damaged']} frame(s) damaged" if log["damaged"] else ""
        warnings.warn(f"{path}: the {what} is corrupt: {missing:.2f} s of {whole:.2f} s missing{damaged}; the rest is "
                      "used, copy the file again if that is too much", stacklevel=3)


# ---- Writing


def write_clip(path: str | os.PathLike, video=None, audio=None, fps: float = 10, sample_rate: int = 16000) -> None:
    """Write frames uint8 (T, H, W, 3) and/or a wave float (S,) to .mp4 .mov .mkv .webm .gif (silent) .wav or .flac.

    ValueError, in one line, for another extension, an unwritable folder, or nothing to write; never half a file."""
    path = check_output(path, (*VIDEO_TYPES, *SOUND_TYPES))
    kind = path.suffix.lower()
    if kind in SOUND_TYPES:
        return _write_sound(path, audio, sample_rate)
    video = np.ascontiguousarray(video) if video is not None else np.zeros(0)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or not video.size:
        raise ValueError(f"{path}: expected frames uint8 (T, H, W, 3), got {video.dtype} {video.shape}")
    T, H, W, _ = video.shape
    picture, sound, extra = (words.split() for words in VIDEO_TYPES[kind])
    inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{W}x{H}", "-r", f"{float(fps):.6f}", "-i", "pipe:0"]
    codecs = ["-vf", _even(kind), "-c:v", *picture]
    with tempfile.TemporaryDirectory() as folder, atomic(path) as whole:
        if audio is not None and sound:
            _wave(audio).tofile(raw := Path(folder) / "wave")
            inputs += [*_raw(sample_rate), "-i", f"file:{raw}"]
            codecs += ["-c:a", *sound]
        _run([*inputs, *codecs, *extra, "-y", f"file:{whole}"], stdin=memoryview(video).cast("B"), name=path)


def add_audio(source: str | os.PathLike, wave: np.ndarray, sample_rate: int, path: str | os.PathLike,
              seconds: float | None = None) -> None:
    """Write the picture of the video file `source` with a new sound, wave float (S,), to .mp4 .mov .mkv or .webm.

    The picture is copied as it is where the container takes it and all of it is wanted, else encoded anew; the wave is
    cut, or padded with silence, to the picture's length, or to its first `seconds`. Errors as `write_clip`'s."""
    path = check_output(path, COPIED)
    kind, media = path.suffix.lower(), probe(source)
    if not media.video:
        raise ValueError(f"{source}: has no picture to add a sound to; give a video file")
    length = packed = _picture_seconds(source, media)
    if packed is None:  # only decoding tells
        for _ in (frames := Video(source, size=1)):
            pass
        length = frames.seconds
    cut = ["-t", f"{seconds:.6f}"] if seconds and seconds < length - 0.02 else []
    S = round((seconds if cut else length) * sample_rate)
    wave = _wave(wave)[:S]
    wave = np.pad(wave, (0, S - len(wave))) if len(wave) < S else wave  # an hour is 230 MB: no copy without need
    picture, sound, extra = (words.split() for words in VIDEO_TYPES[kind])
    inputs = ["-copyts", "-itsoffset", f"{-media.start:.6f}", *_source(source), *_raw(sample_rate), "-i", "pipe:0"]
    rest = ["-map_chapters", "-1", "-c:a", *sound, *extra, *cut]
    copied = ["-c:v", "copy"] + (["-tag:v", "hvc1"] if media.codec == "hevc" and kind in (".mp4", ".mov") else [])
    anew = ["-vf", _even(kind), "-c:v", *picture]
    fits = media.codec in COPIED[kind] and (not media.rotated or kind in (".mp4", ".mov")) and packed and not cut
    with atomic(path) as whole:
        for way in (copied, anew) if fits else (anew,):
            command = [*inputs, "-map", "0:V:0", "-map", "1:a", *way, *rest, "-y", f"file:{whole}"]
            result = _run(command, stdin=memoryview(wave).cast("B"), check=way is anew, name=path)
            if result.returncode == 0:
                return


def _write_sound(path, audio, sample_rate):
    """A wave to .wav or .flac, 16 bit."""
    import soundfile

    if audio is None:
        raise ValueError(f"{path}: there is no sound to write; choose a video type: {' '.join(VIDEO_TYPES)}")
    try:
        with atomic(path) as whole:
            soundfile.write(str(whole), _wave(audio), round(sample_rate), subtype="PCM_16")
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None


def _picture_seconds(path, media):
    """Length of the picture from its packets, undecoded; None if they lack times, as in some .avi and bare streams."""
    command = ["-copyts", *_source(path), "-map", "0:V:0", "-c", "copy", "-f", "framecrc", "pipe:1"]
    listed = _run(command, check=False).stdout.decode()
    base = re.search(r"#tb 0: (\d+)/(\d+)", listed)
    packets = sorted([int(n) for n in line.split(",")[2:4]] for line in listed.splitlines() if line[:1] != "#")
    if not packets or packets[0][0] == NO_TIME:
        return None
    last = packets[-1][1] or (packets[-1][0] - packets[-2][0] if len(packets) > 1 else 0)
    return (packets[-1][0] + last) * int(base[1]) / int(base[2]) - media.start


def _wave(audio):
    """A wave as contiguous float32 (S,), or ValueError."""
    given, audio = np.asarray(audio).dtype, np.ascontiguousarray(audio, dtype=np.float32)
    if given.kind != "f" or audio.ndim != 1 or not len(audio) or not np.isfinite(audio).all():
        raise ValueError(f"expected a wave float (S,), S > 0, of finite numbers; got {given} {audio.shape}")
    return audio


def _raw(sample_rate):
    return ["-f", "f32le", "-ar", str(sample_rate), "-ac", "1"]


def _even(kind):
    """Filter for the picture: GIF's palette, or the even sizes and 4:2:0 that players expect."""
    if kind == ".gif":
        return "split[a][b];[a]palettegen[p];[b][p]paletteuse"
    return "pad=ceil(iw/2)*2:ceil(ih/2)*2,format=yuv420p"


# ---- ffmpeg


def _source(path, start=0.0):
    """Arguments that name an input, from `start` s on or, where only some frames can be cut at, a little earlier."""
    seek = ["-ss", f"{start:.6f}", "-noaccurate_seek"] if start else []
    return [*seek, "-protocol_whitelist", "file,pipe", "-i", f"file:{path}"]


def _ffmpeg(arguments):
    """The command line of the ffmpeg that imageio-ffmpeg brings."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        raise ImportError("reading and writing media needs imageio-ffmpeg: pip install imageio[ffmpeg]") from None
    return [get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "level+info", *arguments]


def _run(arguments, stdin=b"", check=True, name=""):
    """Run ffmpeg -> CompletedProcess; if `check`, its failure is a ValueError about `name`."""
    result = subprocess.run(_ffmpeg(arguments), input=stdin, capture_output=True)
    if check and result.returncode:
        raise ValueError(f"{name}: ffmpeg could not write it ({_reason(result.stderr.decode(errors='replace'))})")
    return result


def _finished(path, code):
    """ValueError if ffmpeg, by its exit code, crashed or was killed: what it had read until then is no whole clip. A
    damaged file also gives an error, a small code, but all that can be read of it."""
    if code < 0 or 0xC0000000 <= code < 0xC0010000:  # a signal; on Windows an exception
        raise ValueError(f"{path}: ffmpeg was killed or crashed while reading it (exit status {code}); try again")


def _reason(text):
    """The first error that ffmpeg tells, without its prefixes."""
    errors = re.findall(r"\[(?:error|fatal)\] (.+)", text)
    return errors[0].strip().rstrip(".") if errors else "ffmpeg cannot read it"


# ---- Encoded clips: encoded once, read by slice


class EncodedClip(NamedTuple):
    """T frames of latents (T, C, H, W) at `fps` and the wave (S,) they go with, in 1/32767, at `sample_rate`: tensors,
    or slices of a file that are read only where they are cut."""

    latents: torch.Tensor
    wave: torch.Tensor
    T: int
    fps: float
    sample_rate: int

    def picture(self, first, frames):
        """`frames` frames from frame `first` on, which the clip must have -> float32 (frames, C, H, W)."""
        return self.latents[first : first + frames].float()

    def sound(self, start, seconds):
        """The wave from `start` s on, `seconds` long, which the clip must have -> float32 (S,)."""
        start, length = int(start * self.sample_rate + 1e-6), round(seconds * self.sample_rate)  # ends within the clip
        return self.wave[start : start + length].float() / 32767


def write_encoded(path, latents, wave, fps, sample_rate):
    """A clip of the cache: latents (T, C, H, W) as fp16, wave float (S,) as int16, cut or padded to T / fps seconds."""
    write_tensors(path, *_encoded(latents, wave, fps, sample_rate))


def _encoded(latents, wave, fps, sample_rate):
    samples = math.ceil(len(latents) / fps * sample_rate - 1e-6)  # a window up to the last frame never lacks one
    wave = np.clip(np.pad(wave[:samples], (0, max(0, samples - len(wave)))), -1, 1)
    wave = torch.from_numpy(np.round(wave * 32767).astype(np.int16))
    tensors = {"latents": latents.half().contiguous(), "wave": wave}
    return tensors, {"fps": str(fps), "sample_rate": str(sample_rate)}


def open_encoded(path):
    """A file of `write_encoded` -> EncodedClip, nothing read yet. ValueError, in one line, if it is none, or torn."""
    try:
        file = safe_open(str(path), framework="pt")
        latents, wave, header = file.get_slice("latents"), file.get_slice("wave"), file.metadata()
        return EncodedClip(latents, wave, latents.get_shape()[0], float(header["fps"]), int(header["sample_rate"]))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no whole clip of a latent cache ({error}); remove it and encode again") from None


# ---- Worlds: procedural clips whose event times are known

KIND_PITCH = (240.0, 400.0, 660.0, 1080.0, 1760.0)  # Hz, fundamental of each kind of ball
KIND_DECAY = (0.16, 0.13, 0.10, 0.08, 0.06)  # s, time constant of each kind's ring
KIND_HUE = (0.0, 0.14, 0.36, 0.60, 0.82)  # red, yellow, green, blue, magenta
TEMPI = (80.0, 130.0)  # beats a minute that `dance` draws from
TRAINING_SEED = 1_000_000  # a training never draws a smaller seed: what is below is held out


class Style(NamedTuple):
    """A way to dance: two key poses, reached on every other beat, and what the music is played on.

    A pose, in figure heights and degrees: sway of the hips, lean of the neck, the feet's distance from the middle,
    lifts of the left and right foot, angles of the left upper and lower arm and of the right, outward from hanging."""

    poses: tuple
    crouch: float  # how far the hips go down on every beat, in figure heights
    hop: float  # how high the figure is in the air between two beats
    drum: float  # Hz
    tick: float  # s, time constant of the cymbal on and between the beats
    lead: tuple  # melody: lowest pitch in Hz, time constants of its decay and of its rise in s, and its partials


STYLES = (  # of `dance`: kind 0 bobs, 1 steps from side to side, 2 waves, 3 jumps, 4 points; shirts have KIND_HUE
    Style(((0.02, 0.03, 0.12, 0, 0, 150, 165, -15, -40), (-0.02, -0.03, 0.12, 0, 0, -15, -40, 150, 165)),
          0.14, 0.00, 58, 0.05, (392, 0.15, 0.002, (1.0, 0.0, 0.4, 0.0, 0.2))),
    Style(((-0.16, -0.04, 0.13, 0, 0.12, 95, 75, -30, -15), (0.16, 0.04, 0.13, 0.12, 0, -30, -15, 95, 75)),
          0.06, 0.00, 88, 0.12, (784, 0.30, 0.002, (1.0, 0.0, 0.0, 0.3))),
    Style(((-0.05, -0.10, 0.15, 0, 0, 115, 95, 180, 215), (0.05, 0.10, 0.15, 0, 0, 180, 215, 115, 95)),
          0.05, 0.00, 48, 0.06, (262, 0.90, 0.050, (1.0, 0.6, 0.4))),
    Style(((0.00, 0.00, 0.05, 0, 0, 15, 10, 15, 10), (0.00, 0.00, 0.20, 0, 0, 140, 165, 140, 165)),
          0.08, 0.12, 120, 0.04, (1047, 0.07, 0.002, (1.0, 0.7, 0.5, 0.3))),
    Style(((-0.07, -0.07, 0.16, 0, 0, 60, -70, 140, 140), (0.07, 0.05, 0.16, 0, 0, 60, -70, -35, -35)),
          0.06, 0.00, 70, 0.20, (523, 0.20, 0.020, (1.0, 0.9, 0.0, 0.8))),
)


class WorldClip(NamedTuple):
    """A clip of a world: video uint8 (T, H, W, 3), audio float32 (S,), fps, sample_rate, and its events:
    times (N,) in seconds from the clip's start and kinds (N,) int; of `dance` also its tempo in beats a minute."""

    video: np.ndarray
    audio: np.ndarray
    fps: float
    sample_rate: int
    times: np.ndarray
    kinds: np.ndarray
    tempo: float | None = None


def bounce(seed: int, seconds: float = 1.8, fps: float = 10, size: int = 64, sample_rate: int = 16000) -> WorldClip:
    """The `bounce` world: 1-3 balls of five kinds, a clip of `seconds` at `fps` and `size` pixels -> WorldClip.

    Every touch of the floor sounds and every sound is a touch; touches before the clip's start leave their ring in it.
    Colour tells a ball's pitch (KIND_HUE, KIND_PITCH), speed its loudness. There are 1-5 touches per 1.8 s, at least
    140 ms apart. The same seed gives the same clip; `size` and `fps` only change how it is drawn, size 0 not at all."""
    _check_length(seconds)
    rng = np.random.default_rng([seed, 0])
    while True:
        touches = _draw_touches(rng, seconds)
        inside = [t for t in touches if 0 <= t[0] < seconds]
        if 1 <= len(inside) <= max(1, round(5 * seconds / 1.8)):
            break
    kinds = rng.permutation(5)[:3]
    gravity = rng.uniform(2.5, 5.5)  # picture heights / s^2
    audio = _bounce_sound(np.random.default_rng([seed, 1]), touches, kinds, gravity, seconds, sample_rate)
    video = _bounce_picture(np.random.default_rng([seed, 2]), touches, kinds, gravity, seconds, fps, size)
    times = np.array([t for t, _, _ in inside])
    return WorldClip(video, audio, fps, sample_rate, times, np.array([kinds[ball] for _, ball, _ in inside]))


def _check_length(seconds):
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}, a clip's length must be above 0")


def _draw_touches(rng, seconds):
    """Touches [(time, ball, seconds since that ball's last touch)], irregular, from before the clip to after it."""
    balls = int(rng.integers(1, 4))
    last = -4.0 - rng.uniform(0, 1, balls)
    now, touches = -4.0, []
    while now < seconds + 3.0:
        now += 0.14 + rng.exponential(0.42 if balls > 1 else 0.3)
        now += max(0.0, 0.35 - (now - last).max())  # until one of the balls has rested
        rested = now - last
        weight = np.where(rested >= 0.35 - 1e-9, rested**2, 0.0)
        ball = int(rng.choice(balls, p=weight / weight.sum()))
        touches.append((now, ball, now - last[ball]))
        last[ball] = now
    return touches


def _bounce_sound(rng, touches, kinds, gravity, seconds, sample_rate):
    """Each touch: a click of 8 ms and a ring of two partials at its ball's pitch, over faint noise -> float32 (S,)."""
    S = round(seconds * sample_rate)
    wave = rng.standard_normal(S) * 10 ** rng.uniform(-4.3, -3.5)
    detune = rng.uniform(0.97, 1.03, 5)
    t = np.arange(int(1.2 * sample_rate)) / sample_rate
    for time, ball, rest in touches:
        first = round(time * sample_rate)
        if first >= S or first + len(t) <= 0:
            continue
        kind = kinds[ball]
        loud = 0.12 + 0.38 * min(1.0, gravity * rest / 2 / 3.0)  # impact speed in picture heights / s
        pitch = KIND_PITCH[kind] * detune[kind]
        ring = np.sin(2 * np.pi * pitch * t) + 0.3 * np.sin(2 * np.pi * 2.1 * pitch * t) * np.exp(-t / 0.05)
        sound = ring * np.exp(-t / KIND_DECAY[kind]) * np.minimum(t / 0.002, 1.0)
        sound = loud * (sound + 0.5 * rng.standard_normal(len(t)) * np.exp(-t / 0.008))
        _mix(wave, first, sound)
    return np.clip(wave, -1, 1).astype(np.float32)


def _mix(wave, first, sound):
    """Add to a wave the part of a sound that falls into it; the sound's first sample lies at `first`, also below 0."""
    skip, n = max(0, -first), min(len(wave), first + len(sound)) - max(0, first)
    if n > 0:
        wave[max(0, first) : max(0, first) + n] += sound[skip : skip + n]


def _bounce_picture(rng, touches, kinds, gravity, seconds, fps, size):
    """Draw the clip -> uint8 (T, size, size, 3). Frame k shows the scene at (k + 1/2)/fps, or at the middle of the
    frame of a slower or odd source that is shown then."""
    T = int(np.ceil(seconds * fps - 1e-9))
    if size == 0:
        return np.zeros((T, 0, 0, 3), np.uint8)
    scene, floor = _backdrop(rng, size)
    beyond = seconds + 3.5  # where a ball that is still in the air at the end comes down
    balls = [_Ball(rng, ball, kinds[ball], touches, gravity, beyond) for ball in sorted({b for _, b, _ in touches})]
    times = _frame_times(rng, T, fps)
    video = np.repeat(scene[None], T, axis=0)
    softness = rng.uniform(0.8, 1.6)
    shadow = rng.random() < 0.6
    for frame, t in zip(video, times):
        for ball in balls:
            ball.draw(frame, t, floor, softness, shadow)
    return _degrade(rng, video)


def _frame_times(rng, T, fps):
    """What time each frame shows (T,)."""
    times = (np.arange(T) + 0.5) / fps
    if fps <= 10 and rng.random() < 0.5:  # as read from a source of another rate
        source = rng.choice([12, 15, 24, 25, 30, 50])
        times = (np.floor(times * source) + 0.5) / source
    return times


class _Ball:
    """One ball's look and path: parabolas between its touches, a straight line across."""

    def __init__(self, rng, ball, kind, touches, gravity, beyond):
        times = [t for t, b, _ in touches if b == ball]
        rest = next(r for _, b, r in touches if b == ball)
        self.touch_times = np.array([times[0] - rest, *times, max(beyond, times[-1] + 0.5)])
        self.places = np.clip(np.cumsum(rng.normal(0, 0.12, len(self.touch_times))) + rng.uniform(0.2, 0.8), 0.12, 0.88)
        self.gravity, self.radius = gravity, rng.uniform(0.065, 0.115)
        hue = KIND_HUE[kind] + rng.uniform(-0.035, 0.035)
        self.colour = _rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0))
        self.shine, self.rim, self.stripe = rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng.random() < 0.3
        self.spin, self.angle = rng.uniform(-6, 6), rng.uniform(0, 6.28)

    def position(self, t):
        """Centre's x and height of the ball's lowest point above the floor at t seconds, in picture heights."""
        after = int(np.clip(np.searchsorted(self.touch_times, t), 1, len(self.touch_times) - 1))
        t0, t1 = self.touch_times[after - 1], self.touch_times[after]
        share = (t - t0) / (t1 - t0)
        x = self.places[after - 1] + share * (self.places[after] - self.places[after - 1])
        return x, self.gravity / 2 * (t - t0) * (t1 - t)

    def draw(self, frame, t, floor, softness, shadow):
        size, r = len(frame), self.radius
        x, height = self.position(t)
        if shadow and height < 0.8:
            spread = r * (1 + height)
            _blend(frame, x, floor, spread, 0.25 * spread, np.zeros(3), 0.35 * (1 - height), 3 * softness)
        if height < 1.2:
            _blend(frame, x, floor - r - height, r, r, self._shade(t), 1.0, softness * max(1, size / 128))

    def _shade(self, t):
        """A function (dx, dy in radii) -> colour (..., 3) for the ball's surface."""
        def shade(dx, dy):
            shine = np.exp(-4 * ((dx + 0.4) ** 2 + (dy + 0.4) ** 2))
            light = 1 - self.rim * np.clip(dx**2 + dy**2, 0, 1) + self.shine * shine
            if self.stripe:
                a = self.angle + self.spin * t
                light = light * np.where(np.abs(dx * np.cos(a) + dy * np.sin(a)) < 0.2, 0.6, 1.0)
            return np.clip(self.colour * light[..., None], 0, 1)
        return shade


def dance(seed: int, seconds: float = 1.8, fps: float = 10, size: int = 64, sample_rate: int = 16000) -> WorldClip:
    """The `dance` world: a figure moves to music, a clip of `seconds` at `fps` and `size` pixels -> WorldClip.

    `times` are the beats, a grid of TEMPI beats a minute and any phase; `kinds` is the same for all of them, one of
    STYLES, to be seen in moves and shirt and heard in drum, cymbal and melody. On every beat the drum sounds, equally
    loud, and the figure turns round at its lowest: between beats it swings from one key pose to the other. The same
    seed gives the same dance, however long; `size` and `fps` only change how it is drawn, size 0 not at all."""
    _check_length(seconds)
    rng = np.random.default_rng([seed, 3])
    kind, tempo = int(rng.integers(len(STYLES))), rng.uniform(*TEMPI)
    period = 60 / tempo
    first = rng.uniform(0, period)
    audio = _dance_sound(np.random.default_rng([seed, 4]), STYLES[kind], first, period, seconds, sample_rate)
    video = _dance_picture(np.random.default_rng([seed, 5]), kind, first, period, seconds, fps, size)
    times = np.arange(first, seconds, period)
    return WorldClip(video, audio, fps, sample_rate, times, np.full(len(times), kind), tempo)


def _dance_sound(rng, style, first, period, seconds, sample_rate):
    """Drum, cymbal and bass on every beat, a weaker cymbal between, a melody of 8 half beats -> float32 (S,)."""
    t = np.arange(int(1.2 * sample_rate)) / sample_rate
    root, loud = 2 ** (rng.uniform(-2, 2) / 12), rng.uniform(0.5, 1.0)
    pitch, decay, rise, partials = style.lead
    drum = np.sin(2 * np.pi * style.drum * (t - 0.06 * np.exp(-t / 0.03))) * np.exp(-t / 0.09)
    tick = np.diff(rng.standard_normal(len(t) + 1)) * np.exp(-t / style.tick)
    beat = 0.45 * drum + 0.12 * rng.uniform(0.7, 1.3) * tick
    weak = 0.015 * rng.uniform(0.0, 1.0) * tick
    scale = pitch * root * 2 ** (np.array([0, 3, 5, 7, 10]) / 12)
    notes = [0.12 * np.exp(-t / decay) * (1 - np.exp(-t / rise)) * sum(
        level * np.sin(2 * np.pi * (k + 1) * tone * t) for k, level in enumerate(partials)) for tone in scale]
    bass = 0.12 * np.exp(-t / 0.25) * (1 - np.exp(-t / 0.004)) * sum(
        np.sin(2 * np.pi * k * root * pitch * 2 ** -round(np.log2(pitch / 85)) * t) / k for k in (1, 2, 3))
    melody, between = rng.integers(0, len(notes), 8), rng.random(8) < 0.3
    wave = np.zeros(round(seconds * sample_rate))
    for half in range(-2 * math.ceil((first + 1.2) / period), math.ceil(2 * (seconds - first) / period)):
        start, note = round((first + half * period / 2) * sample_rate), notes[melody[half % 8]]
        if half % 2 == 0:
            _mix(wave, start, beat + bass + note)
        else:
            _mix(wave, start, weak + 0.2 * between[half % 8] * note)
    noise = 10 ** rng.uniform(-4.3, -3.5) * rng.standard_normal(len(wave))  # last: a longer clip begins like a shorter
    return np.clip(loud * wave + noise, -1, 1).astype(np.float32)


def _dance_picture(rng, kind, first, period, seconds, fps, size):
    """Draw the clip -> uint8 (T, size, size, 3), frame k as `_bounce_picture` does."""
    T = int(np.ceil(seconds * fps - 1e-9))
    if size == 0:
        return np.zeros((T, 0, 0, 3), np.uint8)
    scene, floor = _backdrop(rng, size)
    figure = _Figure(rng, kind, floor + rng.uniform(0.0, 0.05))
    softness, shadow = rng.uniform(0.8, 1.6), rng.random() < 0.6
    video = np.repeat(scene[None], T, axis=0)
    for frame, t in zip(video, _frame_times(rng, T, fps)):
        figure.draw(frame, (t - first) / period, softness, shadow)
    return _degrade(rng, video)


class _Figure:
    """A dancer's build, clothes and moves, seen from the front."""

    def __init__(self, rng, kind, ground):
        self.style, self.ground = STYLES[kind], ground
        self.height, self.x = rng.uniform(0.62, 0.76), rng.uniform(0.4, 0.6)  # in picture heights
        self.limb, self.girth, self.head = rng.uniform(0.048, 0.065), rng.uniform(0.07, 0.11), rng.uniform(0.085, 0.11)
        self.vigour, self.late = rng.uniform(0.85, 1.15), rng.random() < 0.5  # which of the poses is on even beats
        poses = np.array(self.style.poses)
        poses[:, 5:] += rng.uniform(-10, 10, 4)
        self.middle, self.swing = poses.mean(0), self.vigour * (poses[1] - poses[0]) / 2
        hue = KIND_HUE[kind] + rng.uniform(-0.035, 0.035)
        self.shirt = _rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0))
        self.trousers = _rgb(hue + rng.uniform(-0.05, 0.05), rng.uniform(0.3, 0.9), rng.uniform(0.25, 0.6))
        self.skin = _rgb(0.07, rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.95))

    def joints(self, beat):
        """Points (x, height above the ground) in figure heights, `beat` beats after the first: neck, hip, and of the
        left and right side (shoulder, elbow, hand), (hip, knee, foot). All rest, and turn, at whole beats."""
        sway, lean, feet, *rest = self.middle - self.swing * np.cos(np.pi * (beat + self.late))
        lifts, arms = rest[:2], np.radians(rest[2:]).reshape(2, 2)
        low = (1 + np.cos(2 * np.pi * beat)) / 2  # 1 on the beat
        hop = self.vigour * self.style.hop * (1 - low)
        hip = np.array([sway, 0.5 + hop - self.vigour * self.style.crouch * low])
        neck = hip + (lean, 0.31)
        limbs = []
        for side, angles in zip((-1, 1), arms):
            points = [neck + (0.09 * side, -0.02)]
            for angle in angles:
                points.append(points[-1] + 0.18 * np.array([side * np.sin(angle), -np.cos(angle)]))
            limbs.append(points)
        for side, lift in zip((-1, 1), lifts):
            top, foot = hip + (0.05 * side, 0.0), np.array([side * feet, max(lift, 0.0) + hop + self.limb])
            across = (foot - top)[::-1] * (-side, side)  # towards the outside, where the knee goes
            bend = np.sqrt(max(0.235**2 - (across**2).sum() / 4, 0.0))
            limbs.append([top, (top + foot) / 2 + bend * across / np.hypot(*across), foot])
        return neck, hip, limbs

    def draw(self, frame, beat, softness, shadow):
        neck, hip, limbs = self.joints(beat)
        h, softness = self.height, softness * max(1, len(frame) / 128)
        if shadow:
            _blend(frame, self.x + h * hip[0], self.ground, 0.3 * h, 0.05 * h, np.zeros(3), 0.35, 3 * softness)

        def paint(colour, *strokes):
            a, b = (np.array([s[i] for s in strokes]) * (h, -h) + (self.x, self.ground) for i in (0, 1))
            _strokes(frame, a, b, h * np.array([s[2] for s in strokes]), colour, softness)

        arms, legs = ([(a, b, thick * self.limb) for points in part for a, b in zip(points, points[1:])]
                      for part, thick in ((limbs[:2], 1.0), (limbs[2:], 1.2)))
        paint(self.trousers, *legs)
        paint(self.shirt, (neck - (0, 0.06), hip, self.girth))
        paint(0.85 * self.shirt, *arms)
        face = neck + (0, 0.05 + 0.5 * self.head)
        paint(self.skin, (face, face, self.head), *((points[-1], points[-1], 1.2 * self.limb) for points in limbs[:2]))


def _strokes(frame, a, b, radii, colour, softness):
    """Paint strokes with round ends from a to b, both (n, 2) (x, y), and radii (n,), all in picture heights, into frame
    (size, size, 3) with an antialiased edge; a point is a disc."""
    size, pad = len(frame), radii[:, None] + 3 / len(frame)
    x0, y0 = (int(np.clip(v * size, 0, size)) for v in (np.minimum(a, b) - pad).min(0))
    x1, y1 = (int(np.clip(v * size + 1, 0, size)) for v in (np.maximum(a, b) + pad).max(0))
    along, a, radii = (np.float32(v.T[..., None, None]) for v in (b - a, a, radii))  # (n, 2) -> (2, n, 1, 1)
    x = (np.arange(x0, x1, dtype=np.float32) + 0.5) / size - a[0]
    y = (np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5) / size - a[1]
    share = np.clip((x * along[0] + y * along[1]) / np.maximum((along**2).sum(0), 1e-9), 0, 1)
    inside = (radii - np.hypot(x - share * along[0], y - share * along[1])).max(0) * (size / softness) + 0.5
    frame[y0:y1, x0:x1] += np.clip(inside, 0, 1)[..., None] * (colour - frame[y0:y1, x0:x1])


def _blend(frame, x, y, rx, ry, colour, opacity, softness):
    """Paint an ellipse, centre and radii in picture heights, into frame (size, size, 3) with an antialiased edge."""
    size, pad = len(frame), 3 / len(frame)
    x0, x1 = (int(np.clip(v * size, 0, size)) for v in (x - rx - pad, x + rx + pad + 1 / size))
    y0, y1 = (int(np.clip(v * size, 0, size)) for v in (y - ry - pad, y + ry + pad + 1 / size))
    if x0 >= x1 or y0 >= y1:
        return
    dx = ((np.arange(x0, x1) + 0.5) / size - x) / rx
    dy = (((np.arange(y0, y1) + 0.5) / size - y) / ry)[:, None]
    inside = (1 - np.sqrt(dx**2 + dy**2)) * min(rx, ry) * size / softness + 0.5
    alpha = (np.clip(inside, 0, 1) * opacity)[..., None].astype(np.float32)
    paint = colour(dx + 0 * dy, dy + 0 * dx) if callable(colour) else colour
    frame[y0:y1, x0:x1] += alpha * (paint - frame[y0:y1, x0:x1])


def _backdrop(rng, size):
    """A wall and a floor in muted colours -> (float32 (size, size, 3) in [0, 1], floor height from the top)."""
    floor = rng.uniform(0.78, 0.92)
    y = ((np.arange(size) + 0.5) / size)[:, None, None]
    x = ((np.arange(size) + 0.5) / size)[None, :, None]
    top, bottom, ground = (_rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.15, 0.95)) for _ in range(3))
    tilt = rng.uniform(-0.5, 0.5)
    share = np.clip(y + tilt * (x - 0.5), 0, 1)
    scene = np.broadcast_to(top + share * (bottom - top), (size, size, 3)).astype(np.float32)
    for _ in range(rng.integers(0, 3)):  # pictures, windows and doors, with soft edges
        cx, cy, w, h = rng.uniform(0, 1), rng.uniform(0, floor), rng.uniform(0.08, 0.3), rng.uniform(0.08, 0.3)
        soft = rng.uniform(16, 64)
        box = np.clip((w - np.abs(x - cx)) * soft + 0.5, 0, 1) * np.clip((h - np.abs(y - cy)) * soft + 0.5, 0, 1)
        opacity, colour = rng.uniform(0.1, 0.5), _rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.15, 0.95))
        scene = scene + box * opacity * (colour - scene)
    edge = np.clip((y - floor) * size + 0.5, 0, 1)
    scene = scene + edge * (ground * (1 - 0.3 * rng.random() * (y - floor)) - scene)
    return np.ascontiguousarray(scene, dtype=np.float32), floor


def _degrade(rng, video):
    """Sensor noise and block compression as a real file has them; float (T, H, W, 3) -> uint8."""
    T, H, W, _ = video.shape
    if rng.random() < 0.4:
        video = video + rng.normal(0, rng.uniform(0.002, 0.01), (T, H, W, 1)).astype(np.float32)
    if rng.random() < 0.5 and H % 8 == 0 and W % 8 == 0:
        k = np.arange(8)
        dct = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 16) * np.where(k[:, None] == 0, 0.125**0.5, 0.5)
        dct = dct.astype(np.float32)
        blocks = video.reshape(T, H // 8, 8, W // 8, 8, 3).transpose(0, 1, 3, 5, 2, 4)  # (T, H/8, W/8, 3, 8, 8)
        step = np.float32(rng.uniform(0.01, 0.04)) * (1 + (k[:, None] + k[None]) / 4).astype(np.float32)
        blocks = dct.T @ (np.round(dct @ blocks @ dct.T / step) * step) @ dct
        video = blocks.transpose(0, 1, 4, 2, 5, 3).reshape(T, H, W, 3)
    return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


def _rgb(hue, saturation, value):
    """HSV in [0, 1] -> RGB float32 (3,)."""
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


WORLDS = {"bounce": bounce, "dance": dance}  # by the name that train.py's --data knows


# ---- Sources: what train.py's --data may name


class Source(NamedTuple):
    """A stretch of a media file: `start` and `seconds` (None: to the end). `share_of` goes by the last part of its
    name, so that what must not be torn apart shares that part."""

    name: str
    path: Path
    start: float = 0.0
    seconds: float | None = None


def find_sources(entry, around=0.0):
    """An entry of --data -> Sources in a fixed order: every file of a FOLDER, or those that a list names, as
    `aist:FOLDER:LIST.txt` (AIST++, see `_aist`) or `epic:FOLDER:TABLE.csv` (EPIC-Sounds, see `_epic`).

    What is left out is counted and said. ValueError, in one line, if the folder or list is missing or another kind."""
    kind, *rest = re.split(r"(?<!:[A-Za-z]):|:(?![\\/])", str(entry))  # but not at the colon of a drive, aist:C:\...
    lists = {"aist": _aist, "epic": _epic}
    if kind not in lists or len(rest) != 2:
        files = _files(entry)
        return [Source(str(path.relative_to(Path(entry).resolve())), path) for path in files]
    try:
        table = Path(rest[1]).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ValueError(f"{rest[1]}: cannot be read ({reason}); give {kind}:FOLDER:LIST") from None
    found, left_out = lists[kind](_files(rest[0]), Path(rest[1]), table.splitlines(), around)
    said = ", ".join(f"{n} {why}" for why, n in left_out.items() if n) or "nothing"
    print(f"{entry}: {len(found)} clips; left out: {said}", flush=True)
    return found


def _files(folder):
    """Every file below a folder, sorted."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give a folder of files, or a world: {', '.join(WORLDS)}")
    found, seen = [], set()
    for root, inner, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link back to where we are, or have been
            inner.clear()
            continue
        seen.add(real)
        found += [Path(root) / name for name in names if (Path(root) / name).is_file()]
    return sorted(found)


def _aist(files, table, lines, around):
    """AIST++: the videos (gBR_sBM_c01_d04_mBR0_ch01.mp4) of the sequences that a split list names, with "cAll" for the
    camera, but for those of an ignore_list.txt beside it or in the folder above. All that is danced to one music (mBR0)
    is in the same share, so that no model is validated on music that it was trained on."""
    ignore = [path for folder in table.absolute().parents[:2] if (path := folder / "ignore_list.txt").exists()]
    if not ignore:
        print(f"{table}: no ignore_list.txt beside it or above, so bad recordings are not left out", flush=True)
    listed, bad = ({line.strip() for line in text if line.strip()}
                   for text in (lines, ignore[0].read_text().splitlines() if ignore else ()))
    wanted, found, left_out = listed - bad, [], Counter()
    for path in files:
        sequence = re.sub(r"_c\d\d_", "_cAll_", path.stem)
        if sequence in wanted:
            music = sequence.rpartition("_")[0].rpartition("_")[2]
            found.append(Source(f"{path.name}/{sequence}/{music}.wav", path))
        else:
            left_out["on the ignore list" if sequence in bad else "files that the list does not name"] += 1
    left_out["sequences without a file"] = len(wanted - {source.name.split("/")[1] for source in found})
    return found, left_out


def _epic(files, table, lines, around):
    """EPIC-Sounds: a clip for each row, at least `around` seconds long with the event in its middle, or as near to it
    as the video's ends allow. All clips of a video are in the same share."""
    videos, lengths = {path.stem: path for path in files if path.suffix.lower() in VIDEO_TYPES}, {}
    rows, found, left_out = csv.DictReader(lines), [], Counter()
    if missing := {"annotation_id", "video_id", "start_timestamp", "stop_timestamp"} - set(rows.fieldnames or ()):
        raise ValueError(f"{table}: has no column {', '.join(sorted(missing))}; give a table of EPIC-Sounds")
    for row in rows:
        path = videos.get(row["video_id"])
        times = [re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", row[f"{end}_timestamp"] or "")
                 for end in ("start", "stop")]
        start, stop = (sum(float(n) * unit for n, unit in zip(t.groups(), (3600, 60, 1))) if t else 0 for t in times)
        if path and path not in lengths:
            try:
                lengths[path] = probe(path).seconds or math.inf
            except ValueError:
                lengths[path] = 0.0
        why = ("of videos that are not there" if path is None else "whose times cannot be read" if None in times
               else "that end before they start" if stop <= start
               else "of videos that cannot be read" if not lengths[path]
               else "beyond the end of their videos" if stop > lengths[path] + 0.1 else None)
        if why:
            left_out[why] += 1
            continue
        length = min(max(stop - start, around), lengths[path])
        start = min(max(0.0, (start + stop - length) / 2), lengths[path] - length)
        found.append(Source(f"{row['annotation_id']}/{path.name}", path, round(start, 6), round(length, 6)))
    return found, left_out


# ---- Caches: every source decoded once, then read by slice

CACHE_FPS = 2  # frames kept per second of video: nearer ones teach an autoencoder little


@dataclass(frozen=True)
class FileCache:
    """Decoded sources in a fixed order: their names, the safetensors that hold them, each one tensor `data` (n, ...) or
    an encoded clip of n frames, each one's n, and the sizes of the files they come from in bytes."""

    names: tuple
    paths: tuple
    lengths: tuple
    sizes: tuple

    def __len__(self):
        return len(self.names)

    def share(self, share):
        """The sources for "training", "validation" or "test", by `share_of`."""
        keep = [i for i, name in enumerate(self.names) if share_of(name) == share]
        return FileCache(*(tuple(x[i] for i in keep) for x in (self.names, self.paths, self.lengths, self.sizes)))

    def read(self, index, start=0, stop=None):
        """A slice of source `index`, as stored: int16 (S,) or uint8 (T, size, size, 3)."""
        with safe_open(self.paths[index], framework="np") as file:
            return file.get_slice("data")[start : self.lengths[index] if stop is None else stop]

    def wave(self, seed, S):
        """A stretch float32 (S,) of a source of sound, drawn by `seed`, all parts equally likely. One that is too short
        is heard whole, and others from their starts after it."""
        rng, pieces, missing = np.random.default_rng(seed), [], S
        while missing:
            index = self.draw(rng)
            start = int(rng.integers(max(0, self.lengths[index] - S) + 1)) if missing == S else 0
            pieces.append(self.read(index, start, min(start + missing, self.lengths[index])))
            missing -= len(pieces[-1])
        return np.concatenate(pieces).astype(np.float32) / 32767

    def frames(self, seed, n):
        """n frames uint8 (n, size, size, 3) drawn by `seed`, all equally likely."""
        rng = np.random.default_rng(seed)
        drawn = [(index := self.draw(rng), int(rng.integers(self.lengths[index]))) for _ in range(n)]
        return np.concatenate([self.read(index, frame, frame + 1) for index, frame in drawn])

    @functools.cached_property
    def ends(self):
        """Where each source would end if they stood one after the other."""
        return np.cumsum(self.lengths)

    def draw(self, rng):
        """The index of a source, each as likely as it is long."""
        return int(np.searchsorted(self.ends, rng.integers(self.ends[-1]), side="right"))

    def fingerprint(self):
        """Changes with the sources and their order: what a seed draws is a function of both."""
        return f"{zlib.crc32(repr((self.names, self.lengths, self.sizes)).encode()):08x}"


def share_of(path):
    """"test", "validation" or "training", by the CRC-32 of a file's name alone: 1, 1 and 23 of 25 files."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(os.fsencode(Path(path).name)) % 25, "training")


def cache_sounds(entry, cache, sample_rate=16000):
    """Sounds of every source of `entry` -> FileCache of int16 waves (S,), mono; else as `cache_clips`."""
    whole = lambda wave: torch.from_numpy((np.clip(wave, -1, 1) * 32767).round().astype(np.int16))
    decode = lambda path, *span: ({"data": whole(read_audio(path, sample_rate, *span))}, {})
    return _fill(entry, cache, decode, f"sound {sample_rate}")


def cache_frames(entry, cache, size=64, fps=CACHE_FPS):
    """Frames of every source of `entry` -> FileCache of uint8 (T, size, size, 3); else as `cache_clips`."""
    decode = lambda path, *span: ({"data": torch.from_numpy(read_video(path, fps, size, *span))}, {})
    return _fill(entry, cache, decode, f"frames {size} {fps}")


def cache_clips(entry, cache, encode, encoder, fps=10, size=64, sample_rate=16000, frames=1, around=0.0):
    """Every source of `entry` (see `find_sources`) with picture and sound, encoded into the folder `cache` -> FileCache
    of clips for `open_encoded`. encode: uint8 (n, size, size, 3) -> latents (n, C, H, W); `encoder` names it, so that
    another's latents are never taken for its own.

    What is there already is not done again, so a stopped call goes on where it was, and processes that run at once
    share the work; a file that changed is new. Sources without picture or sound, shorter than `frames` or unreadable
    are named with the reason and left out. ValueError if `entry` names nothing, or nothing of it can be used."""

    def decode(path, *span):
        wave = read_audio(path, sample_rate, *span)  # first: cheap, and often what is missing
        latents = torch.cat([encode(chunk).half().cpu() for chunk in Video(path, fps, size, *span)])
        return _encoded(latents, wave, fps, sample_rate)

    return _fill(entry, cache, decode, f"clip {fps:g} {size} {sample_rate} {encoder}", frames, around)


def _fill(entry, cache, decode, kind, shortest=1, around=0.0):
    """Decode what `cache` lacks of `entry`. What cannot be used is tried again next time: a machine may be at fault."""
    cache = Path(cache).resolve()
    sources = [source for source in find_sources(entry, around) if cache not in source.path.parents]
    cache.mkdir(parents=True, exist_ok=True)
    remove_unfinished(cache, ".*.safetensors", age=86400)  # nothing that another process is still writing
    found, rows, skipped, said = {}, [], [], time.monotonic()
    for count, source in enumerate(random.sample(sources, len(sources)), 1):  # each process in its own order
        path = cache / f"{_identity(source, kind)}.safetensors"
        found[source] = str(path), *_decoded(path, source, decode)
        if time.monotonic() > said + 10:
            said = time.monotonic()
            print(f"{entry}: decoding, {count} of {len(sources)}", flush=True)
    for source in sources:
        path, reason, length = found[source]
        if not reason and length < shortest:
            reason = f"{source.path}: {length} frames long, a window has {shortest}; give longer clips"
        if reason:
            skipped.append(reason)
            print(f"skipped {reason}", flush=True)
        else:
            rows.append((source.name, path, length, source.path.stat().st_size))
    print(f"{entry}: {len(sources)} files, {len(skipped)} of them skipped", flush=True)
    if not rows:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"{entry}: none of its {len(sources)} files can be used{first}")
    return FileCache(*map(tuple, zip(*rows)))


def _identity(source, kind):
    """A name for what `kind` makes of the source as its file is now."""
    found = source.path.stat()
    span = f" {source.start} {source.seconds}" if source.seconds else ""
    name = os.fsencode(source.path)  # which may be no UTF-8
    return sha256(name + f" {found.st_size} {found.st_mtime_ns} {kind}{span}".encode()).hexdigest()[:24]


def _decoded(path, source, decode):
    """One source into the cache, unless it is there, whole -> why it cannot be used, or None, and its length."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(str(path), framework="np") as file:
        return None, file.get_slice("latents" if "latents" in file.keys() else "data").get_shape()[0]
    try:
        tensors, header = decode(source.path, source.start, source.seconds)
    except ValueError as error:
        return str(error), 0
    write_tensors(path, tensors, header | {"source": ascii(str(source.path))[1:-1]})
    return None, len(next(iter(tensors.values())))
