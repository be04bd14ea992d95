"""The names of placeholder tokens, and trigger words by them."""

from atomdiff.pipelines.token_names import group_placeholder_tokens, placeholder_tokens


def test_tokens_are_grouped_by_trigger_word():
    assert placeholder_tokens("sks", 1) == ["sks"] and placeholder_tokens("sks", 3) == ["sks", "sks_1", "sks_2"]
    assert group_placeholder_tokens([]) == {}
    assert group_placeholder_tokens(["ohwx", "sks_1", "sks"]) == {"sks": ["sks", "sks_1"], "ohwx": ["ohwx"]}
    assert group_placeholder_tokens(["sks_1", "sks_2"]) == {"sks_1": ["sks_1"], "sks_2": ["sks_2"]}
    assert group_placeholder_tokens(["sks", "sks_2"]) == {"sks": ["sks"], "sks_2": ["sks_2"]}
    assert group_placeholder_tokens(["a_1_1", "a_1", "a"]) == {"a": ["a", "a_1"], "a_1_1": ["a_1_1"]}
    twelve = placeholder_tokens("sks", 12)
    assert group_placeholder_tokens(sorted(twelve)) == {"sks": twelve}
