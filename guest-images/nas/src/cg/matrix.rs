//! The random matrix: a sum of outer products of sparse random vectors, weighted so that the
//! eigenvalues spread over a known range, with a shifted diagonal (NAS-95-020, section 2.3; the
//! order in which NPB draws the numbers).

use super::Parameters;
use crate::math::exp;
use crate::problem::Needs;
use crate::random::Random;
use crate::team::Hooks;

const SEED: u64 = 314_159_265;
/// The matrix's condition number is the inverse of this: the weights fall from 1 to it.
const CONDITION: f64 = 0.1;
/// Element `i` of random vector `i`, so that the diagonal is full.
const OWN_ELEMENT: f64 = 0.5;
/// The most elements that a random vector can have, in class C.
const MAX_ELEMENTS: usize = 16;
/// Vectors or rows between two ticks.
const BLOCK: usize = 64;

/// Rows of elements and their columns, one after the other.
pub(super) struct Matrix<'a> {
    values: &'a mut [f64],
    columns: &'a [u32],
    /// Where each row begins, and where the last one ends.
    starts: &'a [u32],
}

/// How many elements a random vector of `nonzeros` has at most.
const fn width(nonzeros: usize) -> usize {
    nonzeros + 1
}

pub(super) fn needs(order: usize, nonzeros: usize) -> Needs {
    let width = width(nonzeros);
    Needs {
        // The elements before equal places are summed, and the vectors.
        floats: order * width * width + order * width,
        // The same, each with a column; the row's starts, and twice a number for each row.
        words: order * width * width + order * width + (order + 1) + 2 * order,
    }
}

/// A sparse vector.
struct Sparse {
    places: [u32; MAX_ELEMENTS],
    values: [f64; MAX_ELEMENTS],
    len: usize,
}

impl Sparse {
    /// Vector `own` in the sequence: `nonzeros` numbers at places drawn until they differ, and its
    /// own element.
    fn draw(random: &mut Random, own: u32, order: usize, nonzeros: usize) -> Self {
        let mut vector = Self {
            places: [0; MAX_ELEMENTS],
            values: [0.0; MAX_ELEMENTS],
            len: 0,
        };
        let bits = order.next_power_of_two().trailing_zeros();
        while vector.len < nonzeros {
            let value = random.next();
            let place = u32::try_from(random.next_bits() >> (46 - bits)).unwrap_or(u32::MAX);
            if (place as usize) < order && vector.find(place).is_none() {
                vector.push(place, value);
            }
        }
        match vector.find(own) {
            Some(at) => vector.values[at] = OWN_ELEMENT,
            None => vector.push(own, OWN_ELEMENT),
        }
        vector
    }

    fn find(&self, place: u32) -> Option<usize> {
        self.places[..self.len].iter().position(|&p| p == place)
    }

    fn push(&mut self, place: u32, value: f64) {
        self.places[self.len] = place;
        self.values[self.len] = value;
        self.len += 1;
    }
}

impl<'a> Matrix<'a> {
    /// Makes the matrix of a class. `sums` is a vector to work in, of as many elements as the
    /// matrix has rows.
    pub(super) fn make(
        p: &Parameters,
        floats: &'a mut [f64],
        words: &'a mut [u32],
        sums: &mut [f64],
        hooks: &impl Hooks,
    ) -> Self {
        let (order, width) = (p.order, width(p.nonzeros));
        let (values, vector_values) = floats.split_at_mut(order * width * width);
        let (columns, words) = words.split_at_mut(order * width * width);
        let (vector_places, words) = words.split_at_mut(order * width);
        let (starts, words) = words.split_at_mut(order + 1);
        let (lengths, seen) = words.split_at_mut(order);

        // The vectors, and how many elements they give to each row.
        let mut random = Random::new(SEED);
        // NPB's main program takes the first number for itself.
        random.next_bits();
        starts.fill(0);
        for (own, length) in (0..).zip(lengths.iter_mut()) {
            let vector = Sparse::draw(&mut random, own, order, p.nonzeros);
            let at = own as usize * width;
            vector_places[at..][..vector.len].copy_from_slice(&vector.places[..vector.len]);
            vector_values[at..][..vector.len].copy_from_slice(&vector.values[..vector.len]);
            *length = u32::try_from(vector.len).unwrap_or(0);
            for &place in &vector.places[..vector.len] {
                starts[place as usize + 1] += *length;
            }
            if (own as usize).is_multiple_of(BLOCK) {
                hooks.tick(0);
            }
        }
        for row in 0..order {
            starts[row + 1] += starts[row];
        }

        // Each vector's outer product, to the rows: `seen` is where the next element of each goes.
        seen.copy_from_slice(&starts[..order]);
        let ratio = exp(-core::f64::consts::LN_10 / order as f64);
        let mut weight = 1.0;
        for (own, &length) in lengths.iter().enumerate() {
            let vector = own * width..own * width + length as usize;
            let (places, numbers) = (&vector_places[vector.clone()], &vector_values[vector]);
            for (&row, &number) in places.iter().zip(numbers) {
                let next = &mut seen[row as usize];
                let to = *next as usize..*next as usize + places.len();
                *next += length;
                columns[to.clone()].copy_from_slice(places);
                for (value, &other) in values[to].iter_mut().zip(numbers) {
                    *value = other * (weight * number);
                }
            }
            weight *= ratio;
            if own % BLOCK == 0 {
                hooks.tick(0);
            }
        }

        // Each row's elements of equal columns summed, in the order of the columns; rows move up to
        // where there is room.
        seen.fill(0);
        let (mut from, mut to) = (0, 0);
        for (row, mark) in (0..order).zip(1..) {
            let end = starts[row + 1] as usize;
            let first = to;
            for at in from..end {
                let column = columns[at];
                if core::mem::replace(&mut seen[column as usize], mark) != mark {
                    sums[column as usize] = 0.0;
                    columns[to] = column;
                    to += 1;
                }
                sums[column as usize] += values[at];
            }
            sums[row] += CONDITION - p.shift;
            columns[first..to].sort_unstable();
            for (value, &column) in values[first..to].iter_mut().zip(&columns[first..to]) {
                *value = sums[column as usize];
            }
            from = end;
            starts[row + 1] = u32::try_from(to).unwrap_or(u32::MAX);
            if row % BLOCK == 0 {
                hooks.tick(0);
            }
        }
        Self {
            values,
            columns,
            starts,
        }
    }

    /// Row `row` times the vector `of`.
    #[inline(always)]
    pub(super) fn row_times(&self, row: usize, of: &[f64]) -> f64 {
        let range = self.starts[row] as usize..self.starts[row + 1] as usize;
        let (values, columns) = (&self.values[range.clone()], &self.columns[range]);
        // Four sums at a time: one would wait for each addition.
        let mut sums = [0.0; 4];
        let (fours, rest) = values.as_chunks::<4>();
        let (column_fours, column_rest) = columns.as_chunks::<4>();
        for (values, columns) in fours.iter().zip(column_fours) {
            for ((sum, value), &column) in sums.iter_mut().zip(values).zip(columns) {
                *sum += value * of[column as usize];
            }
        }
        for (value, &column) in rest.iter().zip(column_rest) {
            sums[0] += value * of[column as usize];
        }
        (sums[0] + sums[1]) + (sums[2] + sums[3])
    }

    #[cfg(test)]
    pub(super) fn values_mut(&mut self) -> &mut [f64] {
        self.values
    }
}
