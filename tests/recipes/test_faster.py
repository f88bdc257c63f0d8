"""Two-stage training of FASTER: the cache, its resumption and checks, training from it, the curve, the command."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.cost_patterns import ClipCosts
from rcu_ops.faster.cache import ClipCache, ClipSampling, Example, write_cache
from rcu_ops.faster.curve import curve_points
from rcu_ops.faster.training import AggregatorTraining, aggregate_scores
from rcu_ops.models import Faster, VideoResNet
from rcu_ops.nn import make_aggregator
from rcu_ops.nn.aggregators import AverageScores
from rcu_ops.recipes.dataset import network_input
from rcu_ops.recipes.lists import VideoList, read_list
from tests.networks import calibrated

CHANNELS = 128


def model(seed: int = 0) -> Faster:
    torch.manual_seed(seed)
    common = {"num_classes": 2, "width": 4, "stem_pool": True}
    expensive = VideoResNet("bottleneck", (1, 1, 1, 1), "r2plus1d", temporal_strides=(1, 2, 2, 2), **common)
    cheap = VideoResNet("bottleneck", (1, 1, 1, 1), "2d", stem_frames=8, **common)
    for network in (expensive, cheap):
        calibrated(network, frames=8, size=32)
    return Faster(expensive, cheap, make_aggregator("fast_gru", CHANNELS, 2), (1, 1), 8).eval()


SAMPLING = ClipSampling(clips=4, views=2, size=32, scales=(32, 36), seed=3)


@pytest.fixture(scope="module")
def videos(motion: Path) -> VideoList:
    return read_list(motion / "list.csv", 2, ("up", "down"))


@pytest.fixture(scope="module")
def cached(videos: VideoList, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    assert write_cache(model(), videos, SAMPLING, folder, shard=3) == {}
    return folder


def test_cache_holds_what_the_networks_say(cached: Path, videos: VideoList) -> None:
    cache = ClipCache(cached)
    assert len(cache) == len(videos.videos) == 8
    assert sorted(p.name for p in cached.glob("shard-*")) == [f"shard-0000{n}.safetensors" for n in range(3)]
    networks = model()
    for place, view in ((0, 0), (5, 1)):
        example = cache[place, view]
        assert example.label == videos.videos[place].label
        clips = SAMPLING.read(videos.videos[place], place, view, 8)
        with torch.no_grad():
            inputs = networks.clip_inputs(torch.stack([network_input(clips[k : k + 1]) for k in range(4)], 1))[0]
            scores = networks.cheap(network_input(clips))
        assert example.expensive.shape == (2, CHANNELS, 1, 1, 1)
        assert example.cheap.shape == (4, CHANNELS, 1, 1, 1)
        # What is on the disk is the networks' output rounded to half precision, no more and no less.
        near = {"rtol": 2**-10, "atol": 2**-10 * float(inputs.abs().max())}
        torch.testing.assert_close(example.inputs(1, "features", cache.pattern), inputs, **near)
        torch.testing.assert_close(example.cheap_scores, scores, rtol=2**-10, atol=2**-10 * float(scores.abs().max()))
    assert not torch.equal(cache[0, 0].cheap, cache[0, 1].cheap)
    assert cache.holds(1)
    assert cache.holds(3)
    assert cache.holds(-1)
    assert not cache.holds(0)


def test_cache_goes_on_where_it_was(cached: Path, videos: VideoList, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    networks = model()
    plain, calls = networks.cheap.features, []

    def stopping(clip: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2 * 4:  # in the second shard
            raise StopError
        return plain(clip)

    networks.cheap.features = stopping
    with pytest.raises(StopError):
        write_cache(networks, videos, SAMPLING, tmp_path, shard=3)
    assert [p.name for p in tmp_path.glob("shard-*")] == ["shard-00000.safetensors"]
    assert not list(tmp_path.glob(".shard*"))
    with pytest.raises(UserError, match="not complete"):
        ClipCache(tmp_path)
    calls.clear()
    networks.cheap.features = lambda clip: (calls.append(1), plain(clip))[1]
    write_cache(networks, videos, SAMPLING, tmp_path, shard=3)
    assert len(calls) == 2 * 5  # the five videos that were missing
    for place in range(8):
        for a, b in zip(ClipCache(tmp_path)[place, 1], ClipCache(cached)[place, 1], strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_other_weights_or_sampling_are_refused(cached: Path, videos: VideoList, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another weights"):
        write_cache(model(1), videos, SAMPLING, cached, shard=3)
    other = ClipSampling(clips=4, views=2, size=32, scales=(32, 36), seed=4)
    with pytest.raises(UserError, match="another seed"):
        write_cache(model(), videos, other, cached, shard=3)
    # A shard carried over from another cache.
    for path in cached.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "seed": 9}))
    with pytest.raises(UserError, match="other weights or another sampling"):
        ClipCache(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "shard-00001.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"is not a readable safetensors file: .*; remove it, and it is made again"):
        ClipCache(tmp_path)
    with pytest.raises(UserError, match="not a cache"):
        ClipCache(tmp_path / "nowhere")


def test_videos_that_cannot_be_used(motion: Path, tmp_path: Path) -> None:
    (motion / "broken.mp4").write_bytes(b"no video")
    (motion / "some.csv").write_text("path,label\nup_0.mp4,0\nbroken.mp4,1\n")
    videos = read_list(motion / "some.csv", 2)
    test = ClipSampling(clips=2, size=32, scales=(32, 32))
    for _ in range(2):  # known without trying again
        assert list(write_cache(model(), videos, test, tmp_path)) == ["broken.mp4"]
    cache = ClipCache(tmp_path)
    assert len(cache) == 1
    assert cache[0, 0].video == 0


def trained(cache: ClipCache, out: Path, stop: int | None = None, name: str = "fast_gru") -> AggregatorTraining:
    torch.manual_seed(5)
    aggregator = make_aggregator(name, CHANNELS, 2)
    training = AggregatorTraining(
        aggregator, cache, 1, out, {"aggregator": name, "options": {}}, steps=12, batch=4, lr=0.05, save_every=4
    )
    if stop is not None:
        take = training._take

        def stopping() -> tuple[float, float]:
            if training.step == stop:
                raise KeyboardInterrupt
            return take()

        training._take = stopping
    return training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    take = AggregatorTraining._take

    def interrupted(training: AggregatorTraining) -> tuple[float, float]:
        if training.step == 1:
            signal.raise_signal(number)
        return take(training)

    monkeypatch.setattr(AggregatorTraining, "_take", interrupted)
    before = signal.getsignal(number)
    command = ["faster", "train", "--cache", str(cached), "--out", str(tmp_path / "run"), "--steps", "4"]
    assert main(command) == 128 + number
    assert signal.getsignal(number) is before
    assert "rcu-ops: stopped at step 2 of 4; the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "run/aggregator.safetensors").exists()
    assert main(command) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert (tmp_path / "run/aggregator.safetensors").is_file()


def test_training_learns_and_resumes_exactly(cached: Path, tmp_path: Path) -> None:
    cache = ClipCache(cached)
    whole = trained(cache, tmp_path / "a")
    (tmp_path / "a").mkdir()
    rows = whole.run()
    assert rows[0][1] == 0.05
    assert rows[-1][1] < 0.002
    assert rows[-1][2] < rows[0][2]
    scores, labels = aggregate_scores(whole.aggregator, cache, 1)
    assert scores.shape == (8, 4, 2)
    assert (scores[:, -1].argmax(1) == labels).float().mean() > 0.6

    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt):
        trained(cache, tmp_path / "b", stop=6).run()
    resumed = trained(cache, tmp_path / "b")
    resumed.resume()
    assert resumed.step == 4
    resumed.run()
    for a, b in zip(whole.aggregator.parameters(), resumed.aggregator.parameters(), strict=True):
        assert torch.equal(a, b)
    other = trained(cache, tmp_path / "b", name="gru")
    with pytest.raises(UserError, match="another aggregator"):
        other.resume()
    with pytest.raises(UserError, match="--pattern"):
        AggregatorTraining(whole.aggregator, cache, 0, tmp_path, {}, steps=1)


def test_the_cosine_rate_is_that_of_the_steps(cached: Path, tmp_path: Path) -> None:
    training = trained(ClipCache(cached), tmp_path)
    taken: list[float] = []
    training._optimizer.register_step_pre_hook(lambda optimizer, *_: taken.append(optimizer.param_groups[0]["lr"]))
    rows = training.run()
    assert taken == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)])
    assert [row[1] for row in rows] == taken


class Clips:
    """A cache of 1:0 in memory, of four clips of a video and two classes; scores are given as first choices.

    The expensive network is right in clip 0 of all videos and in clip 2 of video 0 alone; the cheap one in clip 1 of
    all videos, and by far. Labels are 1.
    """

    pattern, clips, classes, channels = 0, 4, 2, 1

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: tuple[int, int]) -> Example:
        place, _ = key
        right = torch.tensor([0.0, 1.0])
        expensive = [3 * right, 0 * right, 4 * right if place == 0 else -4 * right, 0 * right]
        cheap = [-right, 9 * right, -right, -right]
        features = torch.zeros(4, 1, 1, 1, 1)
        return Example(place, 1, features, features, torch.stack(expensive), torch.stack(cheap))


class LastClip(AverageScores):
    """The scores of the last clip alone."""

    def forward(self, x: torch.Tensor, state: object = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return x, {}


def test_points_of_the_curve_are_the_accuracy_of_their_clips() -> None:
    costs = ClipCosts(8, expensive=100.0, cheap=10.0, step=1.0)
    points = {(p.method, p.clips): p for p in curve_points(LastClip(1, 2), Clips(), costs)}  # type: ignore[arg-type]
    # Two clips of four are clips 0 and 2: spread over the video, not its first half.
    expected = {
        ("average, expensive", 2): (1 / 4, 200),  # 3 + 4 in video 0, 3 - 4 in the others
        ("average, expensive", 4): (1 / 4, 400),
        ("average, cheap", 2): (0, 20),
        ("average, cheap", 4): (1, 40),  # 9 - 3
        ("1:0", 2): (1 / 4, 201),
        ("1:0", 4): (0, 403),
        ("1:1", 2): (0, 111),
        ("1:1", 4): (0, 223),
        ("1:3", 4): (0, 133),
    }
    assert {key: (point.value, point.gmac) for key, point in points.items()} == expected
    agreeing = curve_points(LastClip(1, 2), Clips(), costs, agreement=True)  # type: ignore[arg-type]
    values = {(point.method, point.clips): point.value for point in agreeing}
    # All expensive clips say 1 of video 0 and 0 of the others.
    assert values["average, expensive", 4] == 1
    assert values["average, cheap", 4] == 1 / 4
    assert values["average, cheap", 2] == values["1:1", 2] == 3 / 4


def test_a_loss_that_is_not_finite_ends_training(cached: Path, tmp_path: Path) -> None:
    training = trained(ClipCache(cached), tmp_path)
    plain = training.scores
    training.scores = lambda inputs: plain(inputs) * (math.nan if training.step == 5 else 1)
    with pytest.raises(UserError, match="the loss is not finite at step 5; a smaller --lr may help"):
        training.run()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]  # that of step 4


def test_every_example_once_per_pass(cached: Path, tmp_path: Path) -> None:
    training = trained(ClipCache(cached), tmp_path)
    first, second = ([key for step in steps for key in training.examples(step)] for steps in ((0, 1), (2, 3)))
    assert sorted(first) == [(place, 0) for place in range(8)]
    assert sorted(second) == [(place, 1) for place in range(8)]
    assert [place for place, _ in first] != [place for place, _ in second]


OPTIONS = ["--model", "faster32"] + [
    part
    for option in ("width=4", "clip_length=8", "pattern=0", "layers=[1,1,1,1]")
    for part in ("--model-option", option)
]


def test_command(motion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    common = ["--videos", str(motion / "list.csv"), "--labels", str(motion / "labels.txt"), "--size", "32"]
    cache = ["faster", "cache", *OPTIONS, *common, "--scales", "32,32", "--clips", "4", "--device", "cpu"]
    assert main([*cache, "--out", str(tmp_path / "c")]) == 0
    assert "8 videos, 4 clips of 8 frames" in capsys.readouterr().out
    assert main([*cache, "--out", str(tmp_path / "singly"), "--clip-batch", "1"]) == 0
    capsys.readouterr()
    together, singly = (ClipCache(tmp_path / name)[3, 0] for name in ("c", "singly"))  # no statistics of a batch
    for a, b in zip(together[2:], singly[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-9, atol=2**-9 * float(a.abs().max()))
    run = ["faster", "train", "--cache", str(tmp_path / "c"), "--val", str(tmp_path / "c"), "--steps", "3"]
    run += ["--batch", "4", "--pattern", "1", "--device", "cpu", "--out", str(tmp_path / "r")]
    assert main(run) == 0
    assert "accuracy after every clip" in capsys.readouterr().out
    weights = tmp_path / "r" / "aggregator.safetensors"
    with safe_open(weights, framework="pt") as file:
        assert "weight_ux" in set(file.keys())
    for extra, column in (([], "accuracy"), (["--agreement"], "agreement_with_all_expensive_clips")):
        out = tmp_path / f"curve{len(extra)}"
        curve = ["faster", "curve", *OPTIONS, "--cache", str(tmp_path / "c"), "--aggregator", str(weights)]
        assert main([*curve, *extra, "--out", str(out)]) == 0
        lines = (out / "curve.csv").read_text().splitlines()
        assert lines[0] == f"method,clips,gmac,{column}"
        rows = {tuple(line.split(",")[:2]): line.split(",") for line in lines[1:] if not line.startswith('"')}
        assert set(rows) == {("1:0", "2"), ("1:0", "4"), ("1:1", "2"), ("1:1", "4"), ("1:3", "4")}
        assert float(rows["1:0", "4"][2]) > float(rows["1:1", "4"][2]) > float(rows["1:3", "4"][2])
        assert sum(line.startswith('"average, ') for line in lines) == 4
        if extra:
            assert lines[-1].endswith(",1.0") or any(
                line.startswith('"average, expensive",4') and line.endswith(",1.0") for line in lines
            )
        assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):  # the classes are the cache's
        main([*curve, "--out", str(tmp_path / "none"), "--classes", "2"])
    assert "--classes" in capsys.readouterr().err
    other = [*cache, "--clips", "1", "--out", str(tmp_path / "c")]
    assert main(other) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "c" / "mine.txt").touch()
    assert main([*other, "--overwrite"]) == 0
    assert ClipCache(tmp_path / "c").clips == 1 and (tmp_path / "c" / "mine.txt").is_file()


def test_commands_refuse_what_does_not_fit(
    motion: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text(f"{motion / 'up_0.mp4'},0\ngone.mp4,1\n")
    (tmp_path / "gone.csv").write_text("gone.mp4,1\n")
    small = ["--classes", "2", "--size", "32", "--scales", "32,32", "--clips", "2", "--device", "cpu"]
    cache = ["cache", *OPTIONS, *small, "--videos", str(tmp_path / "list.csv"), "--out"]
    whole, none, wrong = (str(tmp_path / name) for name in ("one", "none", "wrong.safetensors"))
    assert main(["faster", *cache, whole]) == 3
    assert "warning: videos that could not be used: 'gone.mp4'" in capsys.readouterr().err
    assert main(["faster", *cache, none, "--videos", str(tmp_path / "gone.csv")]) == 3
    capsys.readouterr()
    save_file({"weight": torch.zeros(1)}, wrong)
    train = ["train", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run"), "--cache"]
    curve = ["curve", *OPTIONS, "--out", str(tmp_path / "curve"), "--aggregator", wrong, "--cache"]
    cache.append(str(tmp_path / "other"))
    for command, message in (
        ([*cache, "--scales", "32"], "--scales: expected two numbers such as 256,320, got '32'"),
        ([*cache, "--scales", "16,32"], "--scales: expected two numbers, rising, from the size 32 on, got (16, 32)"),
        ([*cache, "--scales", "36,32"], "--scales: expected two numbers, rising, from the size 32 on, got (36, 32)"),
        ([*cache, "--model-option", "pattern=-1"], "--model-option pattern: the cache of all patterns is pattern=0"),
        ([*train, none], "none of its videos could be used"),
        ([*train, whole, "--option", "a=1"], "--aggregator, --option: "),
        # Said before an hour's training instead of behind it.
        ([*train, whole, "--val", str(cached)], "is a cache of other networks or another pattern"),
        ([*curve, str(cached)], "--cache: expected one of --model-option pattern=0"),
        ([*curve, whole], "not an aggregator for 128 channels and 2 classes"),
    ):
        assert main(["faster", *command]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not any((tmp_path / name).exists() for name in ("other", "run", "curve"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--cache", "nowhere", "--out", "x"], "not a cache"),
        (["train", "--cache", "nowhere", "--out", "x", "--lr", "0"], "--lr"),
        (["train", "--cache", "nowhere", "--out", "x", "--aggregator", "average"], "nothing to train"),
        (["cache", "--videos", "no.csv", "--out", "x", "--clips", "0"], "--clips"),
        (["cache", "--videos", "no.csv", "--out", "x", "--model", "rcn_resnet18"], "--model"),
        (["cache", "--videos", "no.csv", "--out", "x", *OPTIONS, "--cheap-weights", "no.pt"], "no.pt"),
        (["curve", "--cache", "nowhere", "--aggregator", "no", "--out", "x"], "not a cache"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["faster", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
