"""Captions that pycocoevalcap 1.2 scored with Java's PTBTokenizer (2026-11)."""

CANDIDATES = [
    "A man isn't riding the red surf-board, on a wave!",
    "two dogs playing with a ball in the park.",
    "The boys' room has a 10:30 clock (broken).",
    'a a a a sign that says "stop"',
    "A cat.",
    "",
]
REFERENCES = [
    ["A man riding a red surf-board on a wave.", "The surfer isn't on the wave , he's under it."],
    ["Two dogs play with a ball in a park", "dogs playing in the park.", "a ball and 2 dogs"],
    ["A broken clock (10:30) in the boys' room", "A room with a clock; it's broken"],
    ['a sign that says "stop"', "A red stop sign at the corner of Main St."],
    ["A black-and-white cat is sleeping on a sofa.", "cat on a sofa..."],
    ["nothing to see", "a blurry photo"],
]
