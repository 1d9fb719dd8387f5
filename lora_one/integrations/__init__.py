"""LoRA-One in training loops that other libraries own. Each module needs the library that it is named after."""
