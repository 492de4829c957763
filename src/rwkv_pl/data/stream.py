"""The batches of a stream, data.stream=true: each row reads on where its window in the batch before ended."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rwkv_pl.data import order
from rwkv_pl.data.document_ends import DocumentEnds
from rwkv_pl.data.token_file import TokenFile


class StreamBatch(NamedTuple):
    """A micro-batch of a stream.

    tokens:   (rows, T+1) int64.
    restarts: (rows,) bool, the rows that start from an empty state instead of the one after their window before.
    """

    tokens: Tensor
    restarts: Tensor


class StreamBatches(Dataset[StreamBatch]):
    """Training micro-batches of one process: item m = n * A + a is micro-batch a of batch n.

    A = accumulate; see ``order.stream_starts`` and ``order.micro_batch_rows``.
    """

    def __init__(
        self,
        file: TokenFile,
        document_ends: DocumentEnds,
        *,
        ctx_len: int,
        batch_size: int,
        world_size: int,
        rank: int,
        accumulate: int,
    ) -> None:
        self.file, self.document_ends, self.ctx_len, self.batch_size = file, document_ends, ctx_len, batch_size
        self.rows = [
            order.micro_batch_rows(batch_size, world_size=world_size, rank=rank, accumulate=accumulate, micro_batch=a)
            for a in range(accumulate)
        ]

    def __getitem__(self, m: int) -> StreamBatch:
        n, a = divmod(m, len(self.rows))
        self.file.check_unchanged()
        ring = self.file.split("train")
        starts = order.stream_starts(n, n_tokens=len(ring), ctx_len=self.ctx_len, batch_size=self.batch_size)
        starts = starts[self.rows[a]]
        restarts = order.stream_restarts(n, starts, ctx_len=self.ctx_len, document_ends=self.document_ends.positions)
        windows = order.read_windows([ring] * len(starts), starts, self.ctx_len)
        return StreamBatch(torch.from_numpy(windows), torch.from_numpy(restarts))
