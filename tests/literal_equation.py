"""Equation 29 token by token, in fp64, from the float weights; shares no code with masquant."""

import torch


def literal(block, x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """y [batch, tokens, out] for each linear of a site.

    block: anything with weights [out, in] and biases (lists of float tensors), scale [M, in],
    low_rank {modality: (lr_a [in, r], lr_b [r, all outs])} and config (a Scheme). x [batch, tokens,
    in], ids [batch, tokens].
    """
    config, results = block.config, []
    start = 0
    for w, bias in zip(block.weights, block.biases, strict=True):
        out, columns = w.shape
        w = w.double() * block.scale[0].double()
        size = config.group_size or columns
        rounded = torch.empty_like(w)
        for o in range(out):
            for g in range(0, columns, size):
                part = w[o, g : g + size]
                if config.symmetric:
                    limit = 2 ** (config.weight_bits - 1) - 1
                    step = part.abs().max() / limit
                    rounded[o, g : g + size] = (part / step).round() * step
                else:
                    low, high = part.min().clamp(max=0), part.max().clamp(min=0)
                    step = (high - low) / 15
                    zero = (-8 - low / step).round()
                    q = ((part / step).round() + zero).clamp(-8, 7)
                    rounded[o, g : g + size] = (q - zero) * step
        y = torch.empty(*x.shape[:-1], out, dtype=torch.float64)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                m = int(ids[b, t])
                u = x[b, t].double() / block.scale[m].double()
                v = u
                if config.activation_bits < 16:
                    step = u.abs().max() / (2 ** (config.activation_bits - 1) - 1)
                    v = (u / step).round() * step
                y[b, t] = rounded @ v + bias.double()
                if m and block.low_rank:
                    lr_a, lr_b = block.low_rank[config.modalities[m]]
                    y[b, t] += u @ lr_a.double() @ lr_b[:, start : start + out].double()
        start += out
        results.append(y)
    return results
