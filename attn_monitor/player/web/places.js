// Where the patches of a grid lie in an image, in pixels of the image: {grid, origin, cell, size}, each rows first.

// `geometry` is null where the patches tile the image.
export function makePlace(grid, geometry, size) {
  const cell = geometry ? geometry.cell : size.map((pixels, axis) => pixels / grid[axis]);
  return {grid, origin: geometry ? geometry.origin : [0, 0], cell, size};
}

// The patch at a point of the image, -1 where there is none.
export function patchAt({grid, origin, cell}, point) {
  const [row, column] = point.map((x, axis) => Math.floor((x - origin[axis]) / cell[axis] + 1e-6));
  return row >= 0 && row < grid[0] && column >= 0 && column < grid[1] ? row * grid[1] + column : -1;
}

// The patch of a grid that lies where a patch of another grid has the middle of what is seen of it; -1 where none does.
export function patchIn(place, {patch, place: other}) {
  const [rows, columns] = other.grid;
  if (patch < 0 || patch >= rows * columns) return -1;
  return patchAt(place, [Math.floor(patch / columns), patch % columns].map((index, axis) => {
    const within = x => Math.max(0, Math.min(other.size[axis], x)), begin = other.origin[axis] + index * other.cell[axis];
    return (within(begin) + within(begin + other.cell[axis])) / 2;
  }));
}

// The box of all patches on a canvas, and the size of one: it may begin before the canvas, and end behind it.
export function boxOf({grid, origin, cell, size}, width, height) {
  const w = cell[1] * width / size[1], h = cell[0] * height / size[0];
  return {x: origin[1] * width / size[1], y: origin[0] * height / size[0], w, h, width: grid[1] * w, height: grid[0] * h};
}

// What no patch sees: bands of a canvas around the box of all patches, each [x, y, width, height].
export function unseenBands(place, width, height) {
  const {x, y, ...box} = boxOf(place, width, height), within = (a, most) => Math.max(0, Math.min(most, Math.round(a)));
  const left = within(x, width), right = within(x + box.width, width), top = within(y, height), bottom = within(y + box.height, height);
  return [[0, 0, width, top], [0, bottom, width, height - bottom], [0, top, left, bottom - top], [right, top, width - right, bottom - top]]
    .filter(([, , w, h]) => w > 0 && h > 0);
}

// Along one side, the patch of each pixel, -1 in none.
function cellsOfPixels({grid, origin, cell, size}, axis) {
  return Int32Array.from({length: size[axis]}, (_, x) => {
    const index = Math.floor((x - origin[axis]) / cell[axis] + 1e-6);
    return index >= 0 && index < grid[axis] ? index : -1;
  });
}

// Intersection over union of a mask of patches with each object, objects being Uint8Arrays of pixels.
export function overlaps(mask, place, objects) {
  const down = cellsOfPixels(place, 0), across = cellsOfPixels(place, 1), [height, width] = place.size;
  return objects.map(object => {
    let both = 0, either = 0;
    for (let y = 0, i = 0; y < height; y++) {
      const row = down[y] * place.grid[1];
      for (let x = 0; x < width; x++, i++) {
        const inside = row >= 0 && across[x] >= 0 ? mask[row + across[x]] : 0;
        both += inside & object[i];
        either += inside | object[i];
      }
    }
    return either ? both / either : NaN;
  });
}
