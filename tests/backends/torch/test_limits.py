"""The limits on a model's input, checked with models: they run at the limit and fail one token beyond it."""

import pytest
import torch
import transformers as hf

from lora_one.finetune.tuners.torch.limits import limits_of

TINY = {"vocab_size": 40}
GPT = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SEQ2SEQ = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **LAYERS}
HARD = [
    ("GPT2Config", GPT),
    ("GPTNeoConfig", {"max_position_embeddings": 12, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
                      "attention_types": [[["global"], 1]], "bos_token_id": 1, "eos_token_id": 2}),
    ("GPTJConfig", GPT),
    ("CodeGenConfig", {**GPT, "n_head": 4}),
    ("GPTBigCodeConfig", {**GPT}),
    ("OPTConfig", {"max_position_embeddings": 12, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1,
                   "num_attention_heads": 2, "word_embed_proj_dim": 16, "pad_token_id": 1}),
    ("RobertaConfig", {"max_position_embeddings": 14, **SIZES, "pad_token_id": 1, "is_decoder": True}),
    ("BertConfig", {"max_position_embeddings": 12, **SIZES, "is_decoder": True}),
    ("BioGptConfig", {"max_position_embeddings": 12, **SIZES}),
    ("MptConfig", {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 12}),
    ("CTRLConfig", {"n_positions": 12, "n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2}),
]  # fmt: skip
SOFT = [
    ("LlamaConfig", {"max_position_embeddings": 12, **SIZES}, 12),
    ("GPTNeoXConfig", {"max_position_embeddings": 12, **SIZES}, 12),
    ("XGLMConfig", {"max_position_embeddings": 12, "d_model": 16, "ffn_dim": 16, "num_layers": 1,
                    "attention_heads": 2}, 12),
    ("BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    ("MambaConfig", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}, None),
]  # fmt: skip


def build(kind, settings, auto=hf.AutoModelForCausalLM):
    torch.manual_seed(0)
    return auto.from_config(getattr(hf, kind)(**{**TINY, **settings})).eval()


@torch.no_grad()
def run(model, length, answer=None):
    tokens = torch.full((1, length), 5)
    model(tokens) if answer is None else model(tokens, labels=torch.full((1, answer), 5))


@pytest.mark.parametrize(("kind", "settings"), HARD)
def test_a_table_of_positions_ends(kind, settings):
    model = build(kind, settings)
    assert (limits_of(model).positions, limits_of(model).rows) == (12, 40)
    run(model, 12)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, 13)


@pytest.mark.parametrize(("kind", "settings", "trained"), SOFT)
def test_positions_that_are_computed_do_not(kind, settings, trained):
    model = build(kind, settings)
    assert (limits_of(model).positions, limits_of(model).trained) == (None, trained)
    run(model, 30)


@pytest.mark.parametrize(
    ("kind", "settings", "positions"),
    [
        ("BartConfig", {"max_position_embeddings": 12, **SEQ2SEQ}, (12, 12)),
        ("LEDConfig", {"max_encoder_position_embeddings": 24, "max_decoder_position_embeddings": 12,
                       "attention_window": [8], **SEQ2SEQ}, (24, 12)),
        ("MarianConfig", {"max_position_embeddings": 12, **SEQ2SEQ, "pad_token_id": 1,
                          "decoder_start_token_id": 1}, (12, 12)),
        ("T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "n_positions": 12,
                      "decoder_start_token_id": 0}, (None, None)),
    ],
)  # fmt: skip
def test_an_encoder_decoder_has_two(kind, settings, positions):
    model = build(kind, settings, hf.AutoModelForSeq2SeqLM)
    limits = limits_of(model)
    assert (limits.positions, limits.answer_positions) == positions
    longest, answer = positions[0] or 30, positions[1] or 30
    run(model, longest, answer)
    if positions[0] is not None:
        with pytest.raises((IndexError, RuntimeError)):
            run(model, longest + 1, answer)
        with pytest.raises((IndexError, RuntimeError)):
            run(model, longest, answer + 1)


def test_a_picture_model_has_its_language_models_limits():
    text = {**SIZES, "max_position_embeddings": 30, "vocab_size": 40, "model_type": "llama"}
    seen = {**SIZES, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    config = hf.LlavaConfig(text_config=text, vision_config=seen, image_token_index=39)
    limits = limits_of(hf.AutoModelForImageTextToText.from_config(config))
    assert (limits.rows, limits.positions, limits.trained) == (40, None, 30)
