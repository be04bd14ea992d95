import torch

from atomdiff.toybox.base import load_toybox
from atomdiff.toybox.world import SUBJECTS, subject_images


def test_the_embedded_base_draws_its_latents_from_where_it_was_trained():
    vae = load_toybox().vae
    images = torch.cat([subject_images(name)[0].images[:1] for name in SUBJECTS])
    with torch.no_grad():
        posterior = vae.encode(images * 2 - 1).latent_dist
    assert posterior.std.max() < 1e-3
    scaled = posterior.mean * vae.config.scaling_factor
    assert 0.7 < scaled.std() < 1.4 and scaled.mean((0, 2, 3)).abs().max() < 1


def test_the_embedded_base_takes_the_words_of_the_world_as_one_token_each():
    from benchmarks.pretrain.architecture import build_tokenizer

    assert load_toybox().tokenizer.get_vocab() == build_tokenizer().get_vocab()
