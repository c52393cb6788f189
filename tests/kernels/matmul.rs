//! matmul_*.cu under the shim, whose mma, ldmatrix and cp.async are emulated: values against sums in f64, draws bit for bit
//! against the CPU operation, for every layout, dtype, tile and split, on random and ragged shapes.

use tch::{Kind, Tensor};
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::generator;
use temper::ops::cuda::launch::{Executor, Properties};
use temper::ops::cuda::matmul::{
    Choice, Layout, Product, choose_together, matmul, matmul_together, prepare_as, prepare_together,
};
use temper::ops::cuda::noise::{Destination, new_sums, read_sums};
use temper::ops::matmul_error::{ErrorDraw, RowKeys};

use crate::host::{ORDERS, Shim};
use crate::support::{Lcg, assert_bits, floats, tensor};

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];
const KINDS: [Kind; 3] = [Kind::BFloat16, Kind::Half, Kind::Float];

/// Operands of a product of sizes (m, n, k).
pub struct Case {
    layout: Layout,
    pub a: Tensor,
    pub b: Tensor,
    bias: Tensor,
    pub keys: RowKeys,
    sizes: (usize, usize, usize),
}

impl Case {
    pub fn new(layout: Layout, kind: Kind, (m, n, k): (usize, usize, usize), seed: u64) -> Case {
        let mut rng = Lcg(seed);
        let mut matrix = |rows: usize, cols: usize| {
            tensor(&(0..rows * cols).map(|_| rng.value()).collect::<Vec<_>>(), rows, cols, kind)
        };
        let (a, b) = match layout {
            Layout::Nt | Layout::NtMxfp4 | Layout::NtNvfp4 => (matrix(m, k), matrix(n, k)),
            Layout::Nn => (matrix(m, k), matrix(k, n)),
            Layout::Tn => (matrix(k, m), matrix(k, n)),
        };
        let bias = matrix(1, n).view(-1).to_kind(Kind::Float);
        let keys = RowKeys::new((0..m as u64).map(|row| row << 18 ^ 0xABCD_0000_0000_0005).collect());
        Case { layout, a, b, bias, keys, sizes: (m, n, k) }
    }

    pub fn product<'a>(&'a self, into: Destination<'a>, error: Option<&'a ErrorDraw>) -> Product<'a> {
        let Case { layout, a, b, keys, .. } = self;
        Product { layout: *layout, a, b, scales: None, into, bias: None, error, keys, sums: None }
    }

    /// C and, of every element, the sum of its terms' magnitudes, in f64.
    pub fn exact(&self) -> (Tensor, Tensor) {
        let (a, b) = (self.a.to_kind(Kind::Double), self.b.to_kind(Kind::Double));
        let (a, b) = match self.layout {
            Layout::Nt | Layout::NtMxfp4 | Layout::NtNvfp4 => (a, b.transpose(0, 1)),
            Layout::Nn => (a, b),
            Layout::Tn => (a.transpose(0, 1), b),
        };
        (a.matmul(&b), a.abs().matmul(&b.abs()))
    }

    fn choices(&self) -> Vec<Choice> {
        let out = Tensor::empty([1], (Kind::Float, tch::Device::Cpu));
        let product = self.product(Destination::Store(&out), None);
        product.choices(&Shim(0).properties().unwrap()).unwrap()
    }

    /// f32 C without error, by one choice.
    fn clean(&self, shim: Shim, choice: Choice) -> Tensor {
        let (m, n, _) = self.sizes;
        let out = tensor(&vec![f32::NAN; m * n], m, n, Kind::Float);
        prepare_as(&shim, &self.product(Destination::Store(&out), None), choice).unwrap().run(&shim).unwrap();
        out
    }
}

/// Every element within the bound of a sum of sixteen terms at a time: the host adds one by one, a tensor core is coarser, and
/// `temper selftest` has its bound.
pub fn assert_near(found: &Tensor, (exact, magnitude): &(Tensor, Tensor), k: usize, what: &str) {
    let slack = magnitude * (k as f64).sqrt().max(4.0) * f64::from(f32::EPSILON) + 1e-30;
    let worst = ((found.to_kind(Kind::Double) - exact).abs() / slack).max();
    let worst = f64::try_from(worst).unwrap();
    assert!(worst <= 1.0, "{what}: {worst} times the slack");
}

#[test]
fn every_layout_dtype_tile_and_split() {
    // One element; ragged everywhere; several tiles with aligned and with ragged edges.
    let shapes = [(1, 1, 1), (5, 9, 33), (130, 136, 72), (70, 260, 600), (17, 264, 520)];
    for (number, sizes) in shapes.into_iter().enumerate() {
        for layout in LAYOUTS {
            for kind in KINDS {
                let case = Case::new(layout, kind, sizes, number as u64);
                let exact = case.exact();
                for choice in case.choices() {
                    // A few of the many splits.
                    if ![1, 2, 3].contains(&choice.splits) {
                        continue;
                    }
                    let shim = ORDERS[number % ORDERS.len()];
                    let what = format!("{layout:?} {kind:?} {sizes:?} {choice:?} {shim:?}");
                    assert_near(&case.clean(shim, choice), &exact, sizes.2, &what);
                }
            }
        }
    }
}

#[test]
fn random_shapes() {
    let mut rng = Lcg(77);
    let mut below = |n: usize| 1 + rng.next_u32() as usize % n;
    for turn in 0..30 {
        let (layout, kind) = (LAYOUTS[turn % 3], KINDS[turn / 3 % 3]);
        let eights = |x: usize, on: bool| if on { x.next_multiple_of(8) } else { x };
        let aligned = turn % 2 == 0;
        let sizes = (eights(below(150), aligned), eights(below(300), aligned), eights(below(400), aligned));
        let case = Case::new(layout, kind, sizes, turn as u64);
        let all = case.choices();
        let choice = all[below(all.len()) - 1];
        let what = format!("{layout:?} {kind:?} {sizes:?} {choice:?}");
        assert_near(&case.clean(Shim(turn as u32), choice), &case.exact(), sizes.2, &what);
    }
}

#[test]
fn thread_order_and_tiles_beside_change_nothing() {
    let case = Case::new(Layout::Nt, Kind::BFloat16, (140, 200, 320), 3);
    for choice in case.choices() {
        let first = floats(&case.clean(ORDERS[0], choice));
        for shim in &ORDERS[1..] {
            assert_bits(&floats(&case.clean(*shim, choice)), &first, &format!("{choice:?} {shim:?}"));
        }
    }
}

/// The error on a product of zeros is s z itself.
#[test]
fn draws_are_the_definitions_whatever_the_tile() {
    let draw =
        ErrorDraw { law: ErrorLaw::AbsoluteGaussian, scale: 0.05, seed: 0x1234_5678_9ABC_DEF0, stream: 0x1400_0007 };
    for (layout, kind) in LAYOUTS.into_iter().flat_map(|layout| KINDS.map(|kind| (layout, kind))) {
        let (m, n, k) = (37, 331, 264);
        let zero = Case::new(layout, kind, (m, n, k), 1);
        let zero = Case { a: zero.a.zeros_like(), ..zero };
        for list in [true, false] {
            let keys = if list { zero.keys.clone() } else { RowKeys::consecutive(9 << 32, m) };
            let expected: Vec<f32> = (0..m * n)
                .map(|i| {
                    0.0 + draw.scale * generator::normal(draw.seed, draw.stream, keys.host()[i / n], (i % n) as u32)
                })
                .collect();
            for choice in zero.choices().into_iter().filter(|choice| choice.splits <= 2) {
                let out = tensor(&vec![f32::NAN; m * n], m, n, Kind::Float);
                let product = Product { keys: &keys, ..zero.product(Destination::Store(&out), Some(&draw)) };
                prepare_as(&Shim(5), &product, choice).unwrap().run(&Shim(5)).unwrap();
                assert_bits(&floats(&out), &expected, &format!("{layout:?} {kind:?} {choice:?} list {list}"));
            }
        }
    }
}

#[test]
fn the_epilogue_is_the_law_the_bias_and_one_rounding() {
    let (m, n, k) = (21, 200, 96);
    let draw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: 3, stream: 9 };
    for kind in KINDS {
        let case = Case::new(Layout::Nt, kind, (m, n, k), 8);
        for choice in case.choices() {
            let clean = case.clean(Shim(0), choice);
            let (y, bias) = (floats(&clean), floats(&case.bias));
            let noisy = |i: usize| {
                let z = generator::normal(draw.seed, draw.stream, case.keys.host()[i / n], (i % n) as u32);
                draw.law.apply(y[i], draw.scale, z)
            };
            let with_bias: Vec<f32> = (0..m * n).map(|i| noisy(i) + bias[i % n]).collect();
            let (out, sums) = (clean.to_kind(kind), new_sums(1, tch::Device::Cpu).unwrap());
            let product = Product {
                bias: Some(&case.bias),
                sums: Some(&sums),
                ..case.product(Destination::Store(&out), Some(&draw))
            };
            prepare_as(&Shim(2), &product, choice).unwrap().run(&Shim(2)).unwrap();
            let expected = crate::support::rounded(&with_bias, kind);
            assert_bits(&floats(&out), &expected, &format!("{kind:?} {choice:?}"));
            let exact = crate::support::rounded(&(0..m * n).map(|i| y[i] + bias[i % n]).collect::<Vec<_>>(), kind);
            let error_sq: f64 = expected.iter().zip(&exact).map(|(n, e)| f64::from(n - e).powi(2)).sum();
            let found = read_sums(&sums).unwrap()[0];
            assert!((found[1] - error_sq).abs() <= 1e-6 * error_sq, "{kind:?}: {} {error_sq}", found[1]);
            assert_eq!(found[4], (m * n) as f64, "{kind:?}: elements");
            // f32 from the same product, and added to what is there.
            let into = clean.ones_like();
            let product = case.product(Destination::Add(&into), Some(&draw));
            prepare_as(&Shim(2), &product, choice).unwrap().run(&Shim(2)).unwrap();
            let expected: Vec<f32> = (0..m * n).map(|i| 1.0 + noisy(i)).collect();
            assert_bits(&floats(&into), &expected, &format!("{kind:?} {choice:?} added"));
        }
    }
}

/// q, k and v; each has the bits that it has alone, its own draws, its own bias, its own sums. Blocks in a permutation: those of a
/// product that counted on another's tickets would end with parts that are not there.
#[test]
fn products_together_are_each_alone() {
    let (k, stream) = (560, 0x1400_0000);
    for m in [3, 16, 40, 64] {
        let cases = [200, 70, 64].map(|n| Case::new(Layout::Nt, Kind::BFloat16, (m, n, k), 5));
        let draws =
            [0, 1, 2].map(|i| ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: 3, stream: stream + i });
        let outs =
            || [0, 1, 2].map(|i| tensor(&vec![f32::NAN; m * cases[i].sizes.1], m, cases[i].sizes.1, Kind::BFloat16));
        let sums = || [0, 1, 2].map(|_| new_sums(1, tch::Device::Cpu).unwrap());
        let (alone, together, sums_alone, sums_together) = (outs(), outs(), sums(), sums());
        let product = |i: usize, out, sums| Product {
            bias: (i != 1).then_some(&cases[i].bias),
            sums: Some(sums),
            ..cases[i].product(Destination::Store(out), (i != 2).then_some(&draws[i]))
        };
        let all: Vec<Product> = (0..3).map(|i| product(i, &together[i], &sums_together[i])).collect();
        let properties = Properties { multiprocessors: 108, ..Properties::default() };
        let choice = choose_together(&all, &properties).unwrap().unwrap();
        assert!(choice.tile.m <= 64 && (choice.splits > 1 || m == 64), "{m} rows: {choice:?}");
        prepare_together(&Shim(7), &all, choice).unwrap().run(&Shim(7)).unwrap();
        for i in 0..3 {
            prepare_as(&Shim(0), &product(i, &alone[i], &sums_alone[i]), choice).unwrap().run(&Shim(0)).unwrap();
            assert_bits(&floats(&together[i]), &floats(&alone[i]), &format!("{m} rows, product {i}"));
            let (found, expected) = (read_sums(&sums_together[i]).unwrap()[0], read_sums(&sums_alone[i]).unwrap()[0]);
            assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() <= 1e-9 * e.abs()), "{found:?} {expected:?}");
            assert_eq!(found[4] as usize, m * cases[i].sizes.1);
        }
        // What has no kernel for all is made one by one.
        let of_other_k = Case::new(Layout::Nt, Kind::BFloat16, (m, 64, 128), 6);
        let out = tensor(&vec![0.0; m * 64], m, 64, Kind::Float);
        let two = [all[0], of_other_k.product(Destination::Store(&out), None)];
        assert_eq!(choose_together(&two, &properties).unwrap(), None);
        matmul_together(&Shim(0), &two).unwrap();
        assert_near(&out, &of_other_k.exact(), 128, "alone");
    }
}

#[test]
fn matmul_chooses_by_itself_and_names_what_it_cannot_take() {
    let case = Case::new(Layout::Nn, Kind::BFloat16, (40, 72, 200), 4);
    let out = tensor(&[0.0; 40 * 72], 40, 72, Kind::Float);
    matmul(&Shim(0), &case.product(Destination::Store(&out), None)).unwrap();
    assert_near(&out, &case.exact(), 200, "chosen");
    let error = |product: Product| matmul(&Shim(0), &product).err().unwrap().to_string();
    let good = case.product(Destination::Store(&out), None);
    let draw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: 3, stream: 9 };
    let (short, half, wide) = (RowKeys::consecutive(0, 3), out.to_kind(Kind::Half), case.b.to_kind(Kind::Float));
    let transposed = case.b.transpose(0, 1);
    for (text, part) in [
        (error(Product { b: &wide, ..good }), "matmul: b: found dtype Float"),
        (error(Product { b: &transposed, ..good }), "matmul: b"),
        (error(Product { into: Destination::Store(&half), ..good }), "matmul: out: found dtype Half"),
        (error(Product { bias: Some(&case.bias), into: Destination::Add(&out), ..good }), "with a bias"),
        (error(Product { error: Some(&draw), keys: &short, ..good }), "3 row keys for 40 rows"),
    ] {
        assert!(text.contains(part), "{text}");
    }
    let empty = Case::new(Layout::Nt, Kind::BFloat16, (0, 8, 8), 1);
    let out = Tensor::zeros([0, 8], (Kind::Float, tch::Device::Cpu));
    matmul(&Shim(0), &empty.product(Destination::Store(&out), None)).unwrap();
}
