"""One denoising step over many ranks: who makes which part, and what is exchanged for it.

Every rank holds every canvas and takes every solver step, from the same numbers; so canvases stay
equal to the bit, and no latents are ever sent. The parts of a step (windows, branches) are shared
out to the cells of the mesh; inside a cell their tokens are sharded. What cells exchange is their
sum of weighted windows, over the frames that they touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sora_engine.denoise.canvas import Canvas
from sora_engine.denoise.model import Transformer
from sora_engine.denoise.packing import PackedBatch
from sora_engine.denoise.sharing import Part, PartPredictions, Predictions, adapted
from sora_engine.denoise.windows import Window, divided, weight_sum, weighted_sum
from sora_engine.distributed.layout import share
from sora_engine.distributed.mesh import Mesh
from sora_engine.distributed.sharder import BatchSharder
from sora_kernels.transfer import to_device


class RankSharing:
    """`denoise.sharing.StepSharing` over a mesh, as one of its ranks sees it."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._sharder = BatchSharder(mesh)

    def own(self, parts: Sequence[Part]) -> list[Part]:
        """Those of a step's parts that this rank's cell makes, in their order."""
        owners = self._owners(parts)
        return [p for p in parts if owners[_key(p)] == self.mesh.cell]

    def predict(self, transformer: Transformer, batch: PackedBatch) -> Tensor:
        """The transformer's predictions for a whole batch, made of all ranks' shares."""
        mine = self._sharder.shard(batch)
        return self._sharder.gather(adapted(transformer, mine), mine)

    def join(self, parts: Sequence[Part], predictions: PartPredictions) -> Predictions:
        """The blended prediction of each canvas (by id) and branch, from all cells' windows.

        parts: of the step, all of them; predictions: of this cell's own, by canvas, window, branch.
        """
        owners = self._owners(parts)
        branches: dict[tuple[int, bool], list[Part]] = {}
        for part in parts:
            branches.setdefault((id(part.canvas), part.conditional), []).append(part)

        # For each cell and branch: the windows that it made, and the frames that they touch.
        windows_by_cell = [
            {
                branch: [p.window for p in group if owners[_key(p)] == cell]
                for branch, group in branches.items()
            }
            for cell in range(self.mesh.cells.size)
        ]
        shapes = []
        for windows_of in windows_by_cell:
            sizes = [
                len(_frames(windows)) * branches[branch][0].canvas.latents[:, 0].numel()
                for branch, windows in windows_of.items()
                if windows
            ]
            shapes.append((sum(sizes),))
        device = next(iter(branches.values()))[0].canvas.latents.device
        mine = [
            self._own_sum(branches[branch][0].canvas, branch, windows, predictions).flatten()
            for branch, windows in windows_by_cell[self.mesh.cell].items()
            if windows
        ]
        flat = torch.cat(mine) if mine else torch.empty(0, dtype=torch.float32, device=device)
        sums = self.mesh.cells.all_gather(flat, shapes)

        joined = {}
        taken = [0] * len(windows_by_cell)
        for branch, group in branches.items():
            canvas = group[0].canvas
            total = torch.zeros_like(canvas.latents)
            for cell, windows_of in enumerate(windows_by_cell):
                if not windows_of[branch]:
                    continue
                frames = to_device(_frames(windows_of[branch]), device)
                size = len(frames) * total[:, 0].numel()
                summed = sums[cell][taken[cell] : taken[cell] + size]
                taken[cell] += size
                total.index_add_(1, frames, summed.view(len(total), -1, *total.shape[2:]))
            every = [p.window for p in group]
            weights = weight_sum(every, canvas.window_plan, wraps=canvas.wraps)
            joined[branch] = divided(total, to_device(weights, total.device))
        return joined

    def _own_sum(
        self,
        canvas: Canvas,
        branch: tuple[int, bool],
        windows: Sequence[Window],
        predictions: PartPredictions,
    ) -> Tensor:
        by_window = [predictions[branch[0], window, branch[1]] for window in windows]
        whole = weighted_sum(by_window, windows, canvas.window_plan, wraps=canvas.wraps)
        return whole.index_select(1, to_device(_frames(windows), whole.device))

    def _owners(self, parts: Sequence[Part]) -> dict[tuple[int, Window, bool], int]:
        """The cell of each part.

        A guided canvas has its branches in different halves of the mesh where guidance is 2; any
        other's windows go to all cells. Neighbouring windows stay together, since they overlap;
        the cell with the least to do takes the next stretch of them.
        """
        config = self.mesh.config
        load = [0] * config.cells
        by_canvas: dict[int, list[Part]] = {}
        for part in parts:
            by_canvas.setdefault(id(part.canvas), []).append(part)
        owners = {}
        for group in by_canvas.values():
            guided = any(not p.conditional for p in group)
            places: list[tuple[bool | None, range]]
            if guided and config.guidance == 2:
                half = config.window
                places = [(True, range(half)), (False, range(half, 2 * half))]
            else:
                places = [(None, range(config.cells))]
            for branch, cells in places:
                chosen = [p for p in group if branch is None or p.conditional == branch]
                windows = sorted({p.window for p in chosen}, key=lambda w: w.start)
                free = list(cells)
                first = 0
                for count in share(len(windows), min(len(free), len(windows))):
                    cell = min(free, key=lambda c: load[c])
                    free.remove(cell)
                    stretch = set(windows[first : first + count])
                    first += count
                    for part in chosen:
                        if part.window in stretch:
                            owners[_key(part)] = cell
                            load[cell] += part.window.length * part.canvas.latents[0, 0].numel()
        return owners

    def clear(self) -> None:
        """Forget what depends on a batch's composition."""
        self._sharder.clear()


def _key(part: Part) -> tuple[int, Window, bool]:
    return id(part.canvas), part.window, part.conditional


def _frames(windows: Sequence[Window]) -> Tensor:
    """The latent frames that windows touch, in rising order."""
    return torch.unique(torch.cat([window.indices() for window in windows]))
