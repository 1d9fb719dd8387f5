"""Models that PEFT's classes by task do not fit, and layers that PEFT refuses: speech, images, state spaces."""

import copy

import peft
import pytest
import torch
import transformers as T

import lora_one
from lora_one.errors import ModelError, TargetsWarning
from tests.backends.torch.models import tokens

CONFIG = lora_one.Config(rank=2, gradient="exact")
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
CODER = dict(
    vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=1, decoder_start_token_id=2,
    max_target_positions=20,
)  # fmt: skip
WAVES = dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, mask_time_prob=0.0,
             num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)  # fmt: skip
STATES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)


def labels() -> torch.Tensor:
    return tokens(1, rows=2, length=6)


def whisper():
    config = T.WhisperConfig(**CODER, num_mel_bins=8, max_source_positions=10, bos_token_id=1, eos_token_id=2)
    return T.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 20), "labels": labels()}


def speech2text():
    more = dict(max_source_positions=40, conv_channels=16, input_feat_per_channel=8, input_channels=1)
    model = T.Speech2TextForConditionalGeneration(T.Speech2TextConfig(**CODER, **more))
    return model, {"input_features": torch.randn(2, 20, 8), "labels": labels()}


def moonshine():
    config = T.MoonshineConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = T.MoonshineForConditionalGeneration(config)
    return model, {"input_values": torch.randn(2, 2000), "labels": labels()}


def pictures_to_text():
    encoder = T.ViTModel(T.ViTConfig(**SMALL, image_size=16, patch_size=8), add_pooling_layer=False)
    decoder = T.BertLMHeadModel(T.BertConfig(vocab_size=60, **SMALL, is_decoder=True, add_cross_attention=True))
    model = T.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels()}


def blip():
    """It takes `input_ids`, but not `inputs_embeds`, which PEFT passes too."""
    text = dict(vocab_size=60, **SMALL, encoder_hidden_size=16, projection_dim=8, bos_token_id=1, sep_token_id=2)
    vision = dict(**SMALL, image_size=16, patch_size=8)
    model = T.BlipForConditionalGeneration(T.BlipConfig(text_config=text, vision_config=vision, projection_dim=8))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": labels(), "labels": labels()}


@pytest.mark.parametrize("make", [whisper, speech2text, moonshine, pictures_to_text, blip])
def test_models_without_input_ids_start_and_open_again(make, tmp_path):
    torch.manual_seed(0)
    model, batch = make()
    plain = copy.deepcopy(model.eval())
    with torch.no_grad():
        base = float(plain(**batch).loss)
    started, report = lora_one.init(model, [batch], config=CONFIG)
    assert abs(report.base_loss - base) < 1e-5
    with torch.no_grad():
        loss = float(started.eval()(**batch).loss)
        assert loss < base
        lora_one.save(started, tmp_path, report)
        assert abs(float(lora_one.load(copy.deepcopy(plain), tmp_path).eval()(**batch).loss) - loss) < 1e-6
        assert abs(float(peft.PeftModel.from_pretrained(plain, tmp_path).eval()(**batch).loss) - loss) < 1e-6


def test_generate_goes_to_the_model():
    torch.manual_seed(0)
    model, batch = whisper()
    model, _ = lora_one.init(model, [batch], config=CONFIG)
    made = model.generate(input_features=batch["input_features"], max_new_tokens=3, suppress_tokens=[],
                          begin_suppress_tokens=[])  # fmt: skip
    assert made.shape[0] == 2


def test_a_head_over_sounds_is_trained_whole_as_one_over_text():
    torch.manual_seed(0)
    model = T.Wav2Vec2ForSequenceClassification(
        T.Wav2Vec2Config(**SMALL, **WAVES, num_labels=3, classifier_proj_size=8)
    )
    batch = {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 2])}
    model, report = lora_one.init(model, [batch], config=CONFIG)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained == [f"base_model.model.classifier.modules_to_save.default.{side}" for side in ("weight", "bias")]
    assert "projector" in [layer.name for layer in report.layers]


def mamba():
    return T.MambaForCausalLM(T.MambaConfig(**STATES, time_step_rank=4))


def mamba2():
    return T.Mamba2ForCausalLM(T.Mamba2Config(**STATES, num_heads=4, head_dim=8, n_groups=1, chunk_size=4))


def falcon_h1():
    config = T.FalconH1Config(
        vocab_size=60, **SMALL, num_key_value_heads=1, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
        mamba_n_groups=1, mamba_chunk_size=4,
    )  # fmt: skip
    return T.FalconH1ForCausalLM(config)


# Mamba multiplies by dt_proj's weight without calling the layer: it keeps plain LoRA's start, of which `init` warns.
@pytest.mark.filterwarnings("ignore::lora_one.errors.ZeroGradientWarning")
@pytest.mark.parametrize(("make", "layers"), [(mamba, 3), (mamba2, 1), (falcon_h1, 8)])
def test_what_peft_refuses_in_state_space_models_is_left_out_with_a_warning(make, layers):
    torch.manual_seed(0)
    model = make()
    linear = [n for n, x in model.named_modules() if isinstance(x, torch.nn.Linear) and n != "lm_head"]
    batch = {"input_ids": labels(), "labels": labels()}
    plain = copy.deepcopy(model.eval())
    with pytest.warns(TargetsWarning, match=r"no LoRA on \S+\.out_proj: .* it is on " + str(layers)):
        started, report = lora_one.init(model, [batch], config=CONFIG)
    assert [x.name for x in report.layers] == [name for name in linear if not name.endswith("out_proj")]
    assert len(report.layers) == layers
    with torch.no_grad():
        assert abs(report.base_loss - float(plain(**batch).loss)) < 1e-5
        assert float(started.eval()(**batch).loss) < report.base_loss


def test_a_named_target_that_peft_refuses_is_an_error():
    model = mamba()
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=r"'out_proj' is incompatible with Mamba-based models"):
        lora_one.init(
            model, [{"input_ids": labels(), "labels": labels()}], config=lora_one.Config(targets=("out_proj",))
        )
    assert dict(model.named_modules()) == before
