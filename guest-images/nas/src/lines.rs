//! Lines of a 3-D box, several side by side, in memory where the processor can work on them
//! together.
//!
//! A box is stored as planes of rows, and a row as its components one after the other: component
//! `m` of point `x` is at `row[m·width + x]`. The lines along any of the three directions are
//! worked on in *packs* of `L`: point `i` of a pack is `[[f64; L]; C]`, a value for each component
//! and line. So one piece of code serves the lines of every direction, its arithmetic is that of
//! vectors, and memory is read and written by the cache line.

use core::ops::Range;

/// A point of a pack: `C` components of `L` lines.
pub(crate) type Point<const C: usize, const L: usize> = [[f64; L]; C];

/// Memory as points.
pub(crate) fn points<const C: usize, const L: usize>(floats: &mut [f64]) -> &mut [Point<C, L>] {
    let (lanes, _) = floats.as_chunks_mut::<L>();
    lanes.as_chunks_mut::<C>().0
}

/// `L` neighbours of a row; where it ends before, its last element again, so that the lanes that
/// are not used compute with numbers that do no harm.
#[inline(always)]
pub(crate) fn load<const L: usize>(row: &[f64]) -> [f64; L] {
    match row.first_chunk() {
        Some(lanes) => *lanes,
        None => {
            let last = row.last().copied().unwrap_or(1.0);
            core::array::from_fn(|lane| row.get(lane).copied().unwrap_or(last))
        }
    }
}

/// The opposite of [`load`].
#[inline(always)]
fn store<const L: usize>(row: &mut [f64], lanes: &[f64; L]) {
    match row.first_chunk_mut() {
        Some(to) => *to = *lanes,
        None => row.iter_mut().zip(lanes).for_each(|(to, lane)| *to = *lane),
    }
}

/// The packs of `L` lines that make up `lines`.
pub(crate) fn packs<const L: usize>(lines: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = lines.end;
    lines.step_by(L).map(move |at| at..end.min(at + L))
}

/// Lines across rows, those through the points `xs` of each row: one point of the pack from each
/// row, and of that the `components` that are asked for.
#[inline(always)]
pub(crate) fn gather_across<'r, const C: usize, const L: usize>(
    pack: &mut [Point<C, L>],
    rows: impl Iterator<Item = &'r [f64]>,
    width: usize,
    xs: &Range<usize>,
    components: &[usize; C],
) {
    for (point, row) in pack.iter_mut().zip(rows) {
        for (lanes, component) in point.iter_mut().zip(components) {
            *lanes = load(&row[component * width..][xs.clone()]);
        }
    }
}

/// The opposite of [`gather_across`].
#[inline(always)]
pub(crate) fn scatter_across<'r, const C: usize, const L: usize>(
    pack: &[Point<C, L>],
    rows: impl Iterator<Item = &'r mut [f64]>,
    width: usize,
    xs: &Range<usize>,
) {
    for (point, row) in pack.iter().zip(rows) {
        for (component, lanes) in row.chunks_exact_mut(width).zip(point) {
            store(&mut component[xs.clone()], lanes);
        }
    }
}

/// Lines along rows: the points `xs` of each of the rows in `rows`, of which there are at most `L`,
/// each of `row` elements; of each point the `components` that are asked for.
#[inline(always)]
pub(crate) fn gather_along<const C: usize, const L: usize>(
    pack: &mut [Point<C, L>],
    rows: &[f64],
    (row, width): (usize, usize),
    xs: &Range<usize>,
    components: &[usize; C],
) {
    let last = (rows.len() / row).saturating_sub(1);
    for (m, component) in components.iter().enumerate() {
        let lines: [&[f64]; L] = core::array::from_fn(|lane| {
            &rows[lane.min(last) * row + component * width..][xs.clone()]
        });
        for (i, point) in pack.iter_mut().enumerate().take(xs.len()) {
            point[m] = lines.map(|line| line[i]);
        }
    }
}

/// The opposite of [`gather_along`].
#[inline(always)]
pub(crate) fn scatter_along<const C: usize, const L: usize>(
    pack: &[Point<C, L>],
    rows: &mut [f64],
    (row, width): (usize, usize),
    xs: &Range<usize>,
) {
    for (lane, line) in rows.chunks_exact_mut(row).enumerate().take(L) {
        for (m, component) in line.chunks_exact_mut(width).enumerate().take(C) {
            for (to, point) in component[xs.clone()].iter_mut().zip(pack) {
                *to = point[m][lane];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTH: usize = 7;
    const ROW: usize = 2 * WIDTH;

    /// A plane of five rows of seven points of two components, every value its own.
    fn plane() -> Vec<f64> {
        (0..5 * ROW).map(|at| at as f64).collect()
    }

    #[test]
    fn packs_hold_each_line_once_and_go_back_where_they_came_from() {
        let xs = 1..6;
        let mut seen = vec![0; 5 * ROW];
        let mut pack = [[[f64::NAN; 4]; 2]; WIDTH];
        let mut back = vec![-1.0; 5 * ROW];
        for xs in packs::<4>(xs.clone()) {
            gather_across(&mut pack, plane().chunks_exact(ROW), WIDTH, &xs, &[0, 1]);
            for (y, point) in pack.iter().enumerate().take(5) {
                for (m, lanes) in point.iter().enumerate() {
                    for (x, &value) in xs.clone().zip(lanes) {
                        let at = y * ROW + m * WIDTH + x;
                        assert_eq!(value, at as f64);
                        seen[at] += 1;
                    }
                }
            }
            scatter_across(&pack, back.chunks_exact_mut(ROW), WIDTH, &xs);
        }
        for ys in packs::<4>(0..5) {
            let rows = ys.start * ROW..ys.end * ROW;
            gather_along(
                &mut pack,
                &plane()[rows.clone()],
                (ROW, WIDTH),
                &xs,
                &[0, 1],
            );
            for (i, point) in pack.iter().enumerate().take(xs.len()) {
                for (m, lanes) in point.iter().enumerate() {
                    for (y, &value) in ys.clone().zip(lanes) {
                        let at = y * ROW + m * WIDTH + xs.start + i;
                        assert_eq!(value, at as f64);
                        seen[at] += 1;
                    }
                }
            }
            scatter_along(&pack, &mut back[rows], (ROW, WIDTH), &xs);
        }
        for (at, (&seen, &back)) in seen.iter().zip(&back).enumerate() {
            let inside = xs.contains(&(at % WIDTH));
            assert_eq!(seen, if inside { 2 } else { 0 }, "{at}");
            assert_eq!(back, if inside { at as f64 } else { -1.0 }, "{at}");
        }
    }
}
