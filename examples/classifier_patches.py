"""Two classifiers as patches of one small base, on generated images: python examples/classifier_patches.py."""

import argparse
from pathlib import Path

import torch
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification

from atomdiff.classify import list_patches, load_patch, mixed_batch, open_base, set_active, unload_patch
from atomdiff.classify.config import ClassifyConfig
from atomdiff.classify.train import train_classifier
from atomdiff.data.images import read_image
from atomdiff.toybox.folders import write_classes, write_patterns

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=40, help="images a class")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output_dir", default="out/classifier_patches")
options = parser.parse_args()

folder = Path(options.output_dir)
write_classes(folder / "images" / "objects", per_class=options.images, seed=0)
write_patterns(folder / "images" / "patterns", per_class=options.images, seed=0)
config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10)
ResNetForImageClassification(config).save_pretrained(folder / "base")  # stands for one from the Hub

names = ["objects", "patterns"]
for name in names:
    report = train_classifier(
        ClassifyConfig(
            pretrained_model_name_or_path=str(folder / "base"),
            train_data_dir=str(folder / "images" / name),
            output_dir=str(folder / name),
            max_train_steps=options.steps,
            resolution=32,
        )
    )
    print(f"{name}: accuracy {report['accuracy']['test']:.2f}")

model = open_base(str(folder / "base"))
file = next((folder / "images" / "objects").rglob("*.png"))
processor = AutoImageProcessor.from_pretrained(folder / "objects" / "classifier")
pixels = processor(read_image(file), return_tensors="pt")["pixel_values"].repeat(3, 1, 1, 1)
with torch.no_grad():
    before = model(pixels).logits
    for name in names:
        load_patch(model, folder / name / "classifier")
    for patch in list_patches(model):
        set_active(model, patch.name)
        print(f"{patch.name}: {model.config.id2label[int(model(pixels).logits[0].argmax())]}")
    with mixed_batch(model, [*names, None]):
        print(f"in one batch: classes {model(pixels).logits.argmax(dim=1).tolist()}")
    unload_patch(model)
    print(f"the base is as it was: {torch.equal(model(pixels).logits, before)}")
