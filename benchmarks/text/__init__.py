"""Text adaptation of a decoder that is no toy: pretrained on Python, adapted to another language or to summaries."""
