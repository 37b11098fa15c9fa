"""Published sizes as arguments of `LM`: `LM(**SIZES["xlstm_large 7B"], rngs=nnx.Rngs(0))`.

xlstm[1:0], xlstm[7:1], llama   xLSTM paper, arXiv:2405.04517, tables 3 and 7; places of sLSTM blocks: section 4.2
lstm                            where its ablation begins (table 2): bare LSTMs with 607.8 M parameters, 0.15 M of them
                                second biases, which are not here
xlstm_large                     xLSTM 7B, arXiv:2503.13427, and the scaling-law study, arXiv:2510.02228

`configs/scaling.py` trains each of them.
"""

VOCABULARY = 50_304

PAPER = {  # width, blocks, places of the sLSTM blocks in [7:1]
    "125M": (768, 24, (3, 20)),
    "350M": (1024, 48, (3, 5, 7, 40, 42, 44)),
    "760M": (1536, 48, (3, 5, 7, 40, 42, 44)),
    "1.3B": (2048, 48, (3, 5, 7, 40, 42, 44)),
    "2.7B": (2560, 64, None),
}
LLAMA = {  # width, blocks, heads
    "125M": (768, 12, 12),
    "350M": (1024, 24, 16),
    "760M": (1536, 24, 16),
    "1.3B": (2048, 24, 16),
    "2.7B": (2560, 32, 32),
}
LARGE = {  # width, blocks, heads
    "160M": (768, 12, 6),
    "400M": (1024, 24, 4),
    "830M": (1536, 24, 6),
    "1.4B": (2048, 24, 8),
    "2.7B": (2560, 32, 10),
    "7B": (4096, 32, 8),
}


def arguments(backbone: str, dim: int, num_layers: int, **options) -> dict:
    """What all sizes have, and the options of the backbone."""
    return dict(vocab_size=VOCABULARY, backbone=backbone, dim=dim, num_layers=num_layers, **options)


SIZES = (
    {"lstm 608M": arguments("lstm", 1536, 24)}
    | {f"xlstm[1:0] {size}": arguments("xlstm", dim, n, num_heads=4) for size, (dim, n, _) in PAPER.items()}
    | {
        f"xlstm[7:1] {size}": arguments("xlstm", dim, n, num_heads=4, slstm_at=places)
        for size, (dim, n, places) in PAPER.items()
        if places
    }
    | {
        f"llama {size}": arguments("transformer", dim, n, num_heads=heads, context=2048)
        for size, (dim, n, heads) in LLAMA.items()
    }
    | {
        f"xlstm_large {size}": arguments("xlstm_large", dim, n, num_heads=heads, logit_cap=30.0, chunk_size=128)
        for size, (dim, n, heads) in LARGE.items()
    }
)
