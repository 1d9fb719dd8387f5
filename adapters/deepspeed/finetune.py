"""Fine-tune a model in DeepSpeed's engine with LoRA-One. The lines that LoRA-One adds are marked.

torchrun --nproc-per-node 2 adapters/deepspeed/finetune.py                  # the embedded model and task
torchrun --nproc-per-node 2 adapters/deepspeed/finetune.py --model DIR --data FILE.jsonl
"""

import argparse
import os

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from transformers.integrations import HfDeepSpeedConfig

import lora_one
from lora_one import demo
from lora_one.finetune import encode, read_examples

BATCH = 16  # rows of a process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--stage", type=int, default=3, help="of ZeRO")
    parser.add_argument("--out", default="runs/deepspeed")
    options = parser.parse_args()
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.stage},
    }

    deepspeed.init_distributed()
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _in_parts = HfDeepSpeedConfig(settings)  # while it lives, stage 3 loads a model in parts
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    if options.stage < 3:
        model.to(deepspeed.get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = [encode(tokenizer, example) for example in read_examples(options.data)]
    rows = [{"input_ids": s.tokens, "labels": s.labels} for s in sequences]
    rows = rows[: len(rows) // (BATCH * processes) * BATCH * processes]  # as many batches in every process
    collate = DataCollatorForSeq2Seq(tokenizer)
    own = [dict(row) for row in rows[rank::processes]]
    batches = [collate(own[i : i + BATCH]) for i in range(0, len(own), BATCH)]

    model, report = lora_one.init(model, batches[:8])  # LoRA-One: in every process, with its own batches
    optimizer = lora_one.optimizer(model, learning_rate=options.learning_rate)  # LoRA-One: before the engine
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    for step in range(options.steps):
        batch = batches[step % len(batches)].to(engine.device)
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        if rank == 0 and step % max(1, options.steps // 10) == 0:
            print(f"step {step}, loss {loss.item():.4f}", flush=True)
    lora_one.save(engine, options.out, report)  # LoRA-One: whole factors, in a folder that PEFT opens
    if rank == 0:
        print(f"adapter: {options.out}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
