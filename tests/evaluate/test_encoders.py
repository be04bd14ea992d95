import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from atomdiff.evaluate.encoders import ClipEncoder


def save_tiny_clip(folder):
    """Write a CLIP of the usual classes with random weights."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [letter + end for letter in pre_tokenizers.ByteLevel.alphabet() for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate([*sorted(letters), "<|startoftext|>", "<|endoftext|>"])}
    vocab, merges = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>")).model.save(str(folder))
    tokenizer = CLIPTokenizer(vocab, merges, model_max_length=64)
    end = vocabulary["<|endoftext|>"]
    text = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": 64, "eos_token_id": end}
    text |= {"bos_token_id": end - 1, "pad_token_id": end}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    ).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)


def test_clip_embeds_images_and_chooses_among_labels(tmp_path):
    save_tiny_clip(tmp_path)
    encoder = ClipEncoder(str(tmp_path))
    noise = np.random.default_rng(0).integers(0, 256, (35, 40, 48, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in noise]
    embeddings = encoder.embed(images)
    assert embeddings.shape == (35, 8)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(35), atol=1e-5)
    assert torch.allclose(embeddings[3:4], encoder.embed(images[3:4]), atol=1e-5)
    labels = ["beach", "snow"]
    assert encoder.recognize(images[:3], labels) == encoder.recognize(images[:3], labels)
    assert set(encoder.recognize(images, labels)) <= set(labels)
