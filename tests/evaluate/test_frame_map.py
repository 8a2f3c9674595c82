"""Frame mAP by the rules of AVA: by hand, and against a second, plain implementation of each rule."""

import csv
import heapq
import itertools
import math

import numpy as np
import pytest

from vmae import InputError
from vmae.data.ava import AvaBox, read_detections, read_excluded, read_ground_truth
from vmae.evaluate.frame_map import RULES, average_precision, box_iou, frame_map

A, B, C = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9), (0.0, 0.5, 0.4, 0.9)
SHIFTED = (0.1, 0.0, 0.5, 0.4)  # IoU with A: 0.3 * 0.4 / (2 * 0.16 - 0.12) = 0.6
FAR = (0.2, 0.0, 0.6, 0.4)  # 0.2 * 0.4 / (0.32 - 0.08) = 1/3
TRUTH = [
    AvaBox("v", 902, A, 1),
    AvaBox("v", 902, B, 1),
    AvaBox("v", 903, A, 1),
    AvaBox("w", 902, C, 1),
    AvaBox("v", 902, A, 2),
]
# of action 1 by score: hit, miss (IoU 1/3), a second on what was found, hit, miss (another time); one is
# never found
FOUND = [
    AvaBox("v", 902, SHIFTED, 1, 0.9),
    AvaBox("v", 903, FAR, 1, 0.8),
    AvaBox("v", 902, A, 1, 0.7),
    AvaBox("w", 902, C, 1, 0.6),
    AvaBox("v", 904, A, 1, 0.5),
    AvaBox("v", 902, A, 2, 0.2),
]


def test_iou():
    assert box_iou(A, SHIFTED) == pytest.approx(0.6) and box_iou(A, FAR) == pytest.approx(1 / 3)
    assert box_iou(A, B) == 0 and box_iou(A, A) == pytest.approx(1)


def test_a_case_by_hand():
    # Hits: yes, no, no, yes, no. Precision at the hits 1 and 2/4; four to find: (1 + 0.5) / 4.
    assert average_precision(TRUTH[:4], FOUND[:5]) == pytest.approx(0.375)
    assert average_precision(TRUTH[:4], FOUND[:5], 0.3) == pytest.approx(
        (1 + 1 + 0.75) / 4
    )  # FAR is right too
    assert average_precision(TRUTH[:4], []) == 0
    scores = frame_map(TRUTH, FOUND, [1, 2, 3])
    assert scores.actions == {
        1: pytest.approx(0.375),
        2: 1.0,
    }  # action 3 has no ground truth and does not count
    assert scores.mean == pytest.approx((0.375 + 1) / 2)
    assert (scores.key_frames, scores.detections, scores.truth) == (3, 6, {1: 4, 2: 1})


def test_result_does_not_depend_on_the_order_of_rows():
    assert frame_map(TRUTH[::-1], FOUND[::-1], [1, 2]) == frame_map(TRUTH, FOUND, [1, 2])


def test_a_detection_goes_to_the_box_it_overlaps_most():
    # Both detections overlap A most. The box beside is free and overlaps the second by more than 0.5: of no
    # use.
    truth = [AvaBox("v", 1, A, 1), AvaBox("v", 1, SHIFTED, 1)]
    found = [AvaBox("v", 1, A, 1, 0.9), AvaBox("v", 1, (0.01, 0, 0.41, 0.4), 1, 0.8)]
    assert average_precision(truth, found) == pytest.approx(0.5)


def test_excluded_key_frames_and_unlisted_actions():
    scores = frame_map(TRUTH, FOUND, [1], excluded={("v", 903), ("v", 904)})
    # Left: hit, a second on what was found, hit; three to find.
    assert scores.actions == {1: pytest.approx((1 + 2 / 3) / 3)} and scores.detections == 3
    with pytest.raises(InputError, match="no ground truth"):
        frame_map(TRUTH, FOUND, [3])


def test_a_key_frame_counts_its_best_detections_only():
    truth = [AvaBox("v", 1, A, 1), AvaBox("v", 1, B, 2), AvaBox("v", 2, A, 1)]
    crowd = [AvaBox("v", 1, C, 2, 0.5 + i / 1000) for i in range(50)]
    weak = [AvaBox("v", 1, A, 1, 0.1), AvaBox("v", 2, A, 1, 0.05)]
    # The weak one of frame 1 is the 51st.
    assert frame_map(truth, crowd + weak, [1, 2], per_frame=50).actions == {1: 0.5, 2: 0}
    assert frame_map(truth, crowd + weak, [1, 2]).actions == {1: 1.0, 2: 0}
    # Only listed actions fill the places.
    assert frame_map(truth, crowd + weak, [1], per_frame=50).actions == {1: 1.0}


def test_detections_on_key_frames_that_the_ground_truth_does_not_name():
    truth = [AvaBox("v", 1, A, 1)]
    found = [AvaBox("v", 2, A, 1, 0.9), AvaBox("v", 3.5, A, 1, 0.8), AvaBox("v", 1, A, 1, 0.7)]
    assert frame_map(truth, found, [1]).mean == pytest.approx(1 / 3)
    named = {("v", 1), ("v", 3.5)}  # 3.5 is named, and has no box: a detection there is wrong by every rule
    scores = frame_map(truth, found, [1], frames=named)
    assert scores.mean == pytest.approx(1 / 2) and scores.detections == 2


def test_equal_scores_count_as_one_in_any_order():
    """Precision at the end of each group; the first alone, then four that are equal: two hits, two misses."""
    places = (("v", 902, A), ("v", 902, B), ("v", 904, A), ("w", 902, A))
    rows = [AvaBox(*place, 1, 0.5) for place in places]
    first = AvaBox("w", 902, C, 1, 0.9)
    for order in itertools.permutations(rows):
        assert average_precision(TRUTH[:4], [*order, first]) == pytest.approx((1 + 2 * 3 / 5) / 4)
    # A constant score: hits among all, times the share that is found.
    constant = [AvaBox(row.video, row.timestamp, row.box, row.action, 0.5) for row in FOUND[:5]]
    orders = itertools.permutations(constant)
    (value,) = {average_precision(truth, order) for order in orders for truth in (TRUTH[:4], TRUTH[3::-1])}
    assert value == pytest.approx(2 / 5 * 2 / 4)


def test_equal_scores_at_the_limit_of_a_key_frame_go_by_action_and_box():
    truth = [AvaBox("v", 1, A, 1), AvaBox("v", 1, B, 2)]
    found = [AvaBox("v", 1, A, 1, 0.5), AvaBox("v", 1, B, 2, 0.5), AvaBox("v", 1, C, 1, 0.5)]
    for order in itertools.permutations(found):
        assert frame_map(truth, order, [1, 2], per_frame=1).actions == {1: 1.0, 2: 0}  # A comes before C
        assert frame_map(truth, order, [1, 2], per_frame=2).actions == {1: 0.5, 2: 0}
        assert frame_map(truth, order, [1, 2]).actions == {1: 0.5, 2: 1.0}


def test_equal_overlaps_match_the_same_box_in_any_order():
    """A detection lies between two boxes; a second detection finds the first box already matched."""
    left, right, middle = (0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0), (0.125, 0.0, 0.625, 1.0)
    truth = [AvaBox("v", 1, left, 1), AvaBox("v", 1, right, 1)]
    found = [AvaBox("v", 1, middle, 1, 0.9), AvaBox("v", 1, right, 1, 0.8)]
    assert box_iou(middle, left) == box_iou(middle, right) == 0.6
    assert average_precision(truth, found) == average_precision(truth[::-1], found) == 1.0


def test_nan_scores_are_refused():
    with pytest.raises(InputError, match="action 1 on v, 902 s has no score"):
        frame_map(TRUTH, [AvaBox("v", 902, A, 1, math.nan)], [1])


# --- A second implementation, of the published scripts' definition ---


def key_of(row):
    return row[0], f"{float(row[1]):.6f}"


def rows_of(text):
    return list(csv.reader(text.splitlines()))


def area(scores, hits, positives):
    """VOC's area: precision made falling from the right, summed over the steps of the recall."""
    order = np.argsort(-np.array(scores), kind="stable")
    right = np.cumsum(np.array(hits, dtype=float)[order])
    precision = right / np.arange(1, len(right) + 1)
    recall = np.concatenate([[0], right / positives])
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * best).sum())


def plain_frame_map(truth, found, excluded, listed, per_frame, ignores_unnamed):
    """mAP of three CSV texts, key frame by key frame, as the scripts do it."""
    left_out = {key_of(row) for row in rows_of(excluded)}
    boxes, named, positives = {}, set(), dict.fromkeys(listed, 0)
    for row in rows_of(truth):
        named.add(key_of(row))
        if len(row) > 2 and int(row[6]) in listed and key_of(row) not in left_out:
            boxes.setdefault((key_of(row), int(row[6])), []).append([float(x) for x in row[2:6]])
            positives[int(row[6])] += 1
    frames = {}
    for row in rows_of(found):
        if int(row[6]) not in listed:
            continue
        heap = frames.setdefault(key_of(row), [])
        item = (float(row[7]), int(row[6]), *(float(x) for x in row[2:6]))
        if per_frame is None or len(heap) < per_frame:
            heapq.heappush(heap, item)
        elif item[0] > heap[0][0]:
            heapq.heapreplace(heap, item)
    scores, hits = {}, {}
    for key, heap in frames.items():
        if key in left_out or (ignores_unnamed and key not in named):
            continue
        taken = set()
        for score, action, *box in sorted(heap, key=lambda item: -item[0]):
            ious = [box_iou(tuple(box), tuple(other)) for other in boxes.get((key, action), [])]
            place = int(np.argmax(ious)) if ious else None
            hit = place is not None and ious[place] >= 0.5 and (action, place) not in taken
            if hit:
                taken.add((action, place))
            scores.setdefault(action, []).append(score)
            hits.setdefault(action, []).append(hit)
    values = [area(scores.get(k, []), hits.get(k, []), n) for k, n in positives.items() if n]
    return float(np.mean(values))


def ava_like(seed, frames=40, actions=12):
    """CSV texts of ground truth, detections and excluded key frames, without equal scores. Some key frames
    have no box (named or not), some are at parts of a second, some actions are not listed."""
    rng = np.random.default_rng(seed)
    truth, found, excluded = [], [], []
    scores = iter(rng.permutation(100_000) / 100_000)
    for number in range(frames):
        time = f"{902 + number:04}" if number % 2 else f"{number + rng.random():.6f}"
        key = f"video{number % 3},{time}"
        kind = rng.choice(["boxes", "empty", "unnamed"], p=[0.7, 0.15, 0.15])
        corners = rng.uniform(0, 0.6, (rng.integers(1, 7), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.4, corners.shape)], 1)
        if kind == "empty":
            truth.append(key)
        elif kind == "boxes":
            for person, box in enumerate(boxes):
                for action in rng.choice(actions, rng.integers(1, 4), replace=False) + 1:
                    cells = ",".join(f"{x:.3f}" for x in box)
                    truth.append(f"{key},{cells},{action},{person}")
        for box in boxes + rng.normal(0, 0.03, boxes.shape):
            x1, y1, x2, y2 = box.clip(0, 1)
            if x1 < x2 and y1 < y2:
                cells = f"{x1:.4f},{y1:.4f},{x2:.4f},{y2:.4f}"
                found += [f"{key},{cells},{action},{next(scores)}" for action in range(1, actions + 1)]
        if rng.random() < 0.1:
            excluded.append(key)
    return ["\n".join(rows) + "\n" for rows in (truth, found, excluded)]


@pytest.fixture
def files(tmp_path):
    def write(texts):
        paths = [tmp_path / name for name in ("truth.csv", "found.csv", "excluded.csv")]
        for path, text in zip(paths, texts):
            path.write_text(text)
        return paths

    return write


@pytest.mark.parametrize("seed", range(4))
def test_each_rule_against_a_second_implementation(files, seed):
    texts, listed = ava_like(seed), list(range(1, 11))  # 11 and 12 are not listed
    paths = files(texts)
    truth = read_ground_truth(paths[0], listed, skip_unlisted=True)
    found, excluded = read_detections(paths[1], listed, skip_unlisted=True), read_excluded(paths[2])
    values = []
    for rule in RULES.values():
        ignores = rule.unannotated == "ignore"
        named = truth.frames if ignores else None
        got = frame_map(
            truth.rows, found, listed, excluded=excluded, per_frame=rule.per_frame, frames=named
        ).mean
        assert got == pytest.approx(plain_frame_map(*texts, listed, rule.per_frame, ignores), rel=1e-12)
        values.append(got)
    assert len(set(values)) == 3  # on this data the rules differ


def test_equal_scores_give_the_lowest_value_of_the_scripts(files):
    """The scripts' value depends on the order of rows with equal scores; over all orders, ours is the least.
    Here each row has a key frame of its own."""
    truth = [f"v,{t},0.1,0.1,0.5,0.5,1,0" for t in range(4)]
    hits = [f"v,{t},0.1,0.1,0.5,0.5,1,{score}" for t, score in ((0, 0.9), (1, 0.5), (2, 0.5))]
    misses = [f"v,{t},0.5,0.5,0.9,0.9,1,{score}" for t, score in ((4, 0.9), (5, 0.5), (6, 0.2))]
    rows = hits + misses
    paths = files(["\n".join(part) for part in (truth, rows, [])])
    ours = frame_map(read_ground_truth(paths[0]).rows, read_detections(paths[1]), [1]).mean
    theirs = [
        plain_frame_map("\n".join(truth), "\n".join(order), "", [1], None, False)
        for order in itertools.permutations(rows)
    ]
    assert min(theirs) == pytest.approx(ours, rel=1e-12) and max(theirs) > ours + 0.1


def test_equal_scores_at_the_limit_are_those_of_the_script_for_a_sorted_file():
    """The script keeps the first of equal scores at its limit; of a file sorted by score, then action and
    box, these are the ones kept here."""
    rng = np.random.default_rng(5)
    drawn = zip(rng.integers(0, 60, 360) / 100, rng.integers(1, 9, 360), rng.integers(0, 4, 360) / 4)
    places = {(int(action), (x, 0.1, x + 0.3, 0.9)): float(score) for x, action, score in drawn}
    rows = [AvaBox("v", 1, box, action, score) for (action, box), score in places.items()]
    rows.sort(key=lambda row: (-row.score, row.action, row.box))
    heap = []
    for row in rows:
        item = (row.score, row.action, row.box)
        if len(heap) < 50:
            heapq.heappush(heap, item)
        elif item[0] > heap[0][0]:
            heapq.heapreplace(heap, item)
    assert rows[49].score == rows[50].score  # the limit is among equal scores
    # All that count are correct, and all of the truth is found: the same 50.
    truth = [AvaBox("v", 1, box, action) for _, action, box in heap]
    assert frame_map(truth, rows[::-1], range(1, 9), per_frame=50).mean == 1
    assert frame_map(truth, rows, range(1, 9), per_frame=49).mean < 1
