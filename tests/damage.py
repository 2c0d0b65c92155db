"""Random damage to the bytes of a file."""


def mutate(rng, stream, other):
    """A flipped bit, a random byte, a cut, an insertion, or the head of one stream on the tail of another."""
    data = bytearray(stream)
    kind = rng.randrange(5)
    at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(48, len(data)))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at : at + rng.choice([1, 2, 4, len(data)])]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 64]))
    else:
        data[at:] = other[min(at, len(other)) :]
    return bytes(data)
