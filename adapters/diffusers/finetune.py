"""Fine-tune the UNet of a diffusers pipeline with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/diffusers/finetune.py                                      # a tiny random UNet on random images
python adapters/diffusers/finetune.py --model DIR --data FILE.safetensors  # see the README for what the file holds
"""

import argparse
import shutil
from itertools import islice
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lora_one

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )


def tiny_data() -> dict[str, Tensor]:
    """Two kinds of images, told apart by their text."""
    kinds = torch.arange(64) % 2
    text = torch.randn(2, 5, 12)[kinds]
    return {"latents": torch.randn(2, 4, 8, 8)[kinds] + 0.1 * torch.randn(64, 4, 8, 8), "text": text}


def noised(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch: latents with noise, and the noise to predict."""
    latents, text = (torch.stack(column) for column in zip(*rows, strict=True))  # (n, c, h, w), (n, tokens, width)
    noise = torch.randn_like(latents)
    steps = torch.randint(SCHEDULER.config.num_train_timesteps, (len(rows),))
    return {"sample": SCHEDULER.add_noise(latents, noise, steps), "timestep": steps, "text": text, "noise": noise}


def noise_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    predicted = model(batch["sample"], batch["timestep"], encoder_hidden_states=batch["text"]).sample
    return nn.functional.mse_loss(predicted, batch["noise"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pipeline with a UNet")
    parser.add_argument("--data", help='safetensors file with "latents" and "text"')
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=Path("runs/diffusers"))
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet2DConditionModel.from_pretrained(options.model, subfolder="unet") if options.model else tiny_unet()
    data = load_file(options.data) if options.data else tiny_data()
    rows = TensorDataset(data["latents"], data["text"])
    loader = DataLoader(rows, options.batch_size, shuffle=True, collate_fn=noised, drop_last=True)

    config = lora_one.Config(targets=["to_q", "to_k", "to_v", "to_out.0"])
    model, report = lora_one.init(unet.to(device), list(islice(loader, 4)), noise_loss, config)  # LoRA-One
    print(report.summary())
    optimizer = lora_one.optimizer(model, learning_rate=options.learning_rate)  # LoRA-One

    model.train()
    step = 0
    while step < options.steps:
        for batch in islice(loader, options.steps - step):
            loss = noise_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % max(1, options.steps // 10) == 0:
                print(f"step {step}: loss {loss.item():.4f}")
            step += 1

    lora_one.save(model, options.out / "peft", report)  # LoRA-One: a folder that PEFT opens
    shutil.rmtree(options.out / "diffusers", ignore_errors=True)  # of an earlier run: convert wants an empty folder
    lora_one.convert(options.out / "peft", options.out / "diffusers", "diffusers", component="unet")  # LoRA-One
    print(f"for load_lora_weights: {options.out / 'diffusers'}")


if __name__ == "__main__":
    main()
