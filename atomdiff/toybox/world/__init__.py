"""The toybox's world: a renderer of things in scenes, batched, on CPU and CUDA."""

from atomdiff.toybox.world.canvas import PART_KINDS
from atomdiff.toybox.world.captions import (
    Captions,
    caption_text,
    combination_is_held_out,
    individuals_of,
    make_captions,
    named_colors,
    sample_captions,
)
from atomdiff.toybox.world.held_out import is_held_out, sample_individuals
from atomdiff.toybox.world.images import subject_images, to_images, write_subject_images
from atomdiff.toybox.world.individuals import Individuals, draw_individuals
from atomdiff.toybox.world.patterns import FAMILY_NAMES, HELD_OUT_FAMILIES, PATTERNS
from atomdiff.toybox.world.renderer import IMAGE_SIZE, Rendering, render
from atomdiff.toybox.world.subjects import HARD, SUBJECTS, TUNING_SUBJECTS
from atomdiff.toybox.world.things import CLASSES
from atomdiff.toybox.world.views import Views, sample_views
from atomdiff.toybox.world.words import COLORS, SCENES

__all__ = [
    "CLASSES",
    "COLORS",
    "FAMILY_NAMES",
    "HARD",
    "HELD_OUT_FAMILIES",
    "IMAGE_SIZE",
    "PART_KINDS",
    "PATTERNS",
    "SCENES",
    "SUBJECTS",
    "TUNING_SUBJECTS",
    "Captions",
    "Individuals",
    "Rendering",
    "Views",
    "caption_text",
    "combination_is_held_out",
    "draw_individuals",
    "individuals_of",
    "is_held_out",
    "make_captions",
    "named_colors",
    "render",
    "sample_captions",
    "sample_individuals",
    "sample_views",
    "subject_images",
    "to_images",
    "write_subject_images",
]
