//! The gradients of ops::token_logprobs, of log-probabilities and of entropies, against torch's autograd on the plain formula.

use tch::{Kind, Tensor};
use temper::ops::autograd::run_backward;
use temper::ops::matmul_error::RowKeys;
use temper::ops::noisy_linear::NoisyLinearCall;
use temper::ops::token_logprobs::token_logprobs;

const HIDDEN: i64 = 6;

fn tensor(shape: [i64; 2], seed: i64, scale: f64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(shape, (Kind::Float, tch::Device::Cpu)) * scale
}

fn values(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.contiguous().view([-1])).unwrap()
}

/// Gradients of hidden and W of sum(g logprob) + sum(h entropy): ours, torch's.
fn gradients(rows: i64, vocab: i64, temperature: f64, logprob: bool, entropy: bool) -> [(Tensor, Tensor); 2] {
    let scale = 2.0 / (HIDDEN as f64).sqrt();
    let (x, w) = (tensor([rows, HIDDEN], 1, scale), tensor([vocab, HIDDEN], 2, 1.0));
    let targets = Tensor::from_slice(&(0..rows).map(|r| r * r % vocab).collect::<Vec<_>>());
    let g = tensor([rows, 1], 3, f64::from(u8::from(logprob))).view([-1]);
    let h = tensor([rows, 1], 4, f64::from(u8::from(entropy))).view([-1]);

    let hidden = x.detach_copy().set_requires_grad(true);
    let master = w.detach_copy().set_requires_grad(true);
    let gradient = master.detach().zeros_like();
    let call = NoisyLinearCall::clean(RowKeys::new((0..rows as u64).collect()), true);
    let ours =
        token_logprobs(&hidden, &master.detach(), Some((&master, &gradient)), &targets, temperature, &call).unwrap();
    let terms = [(logprob, &ours.logprobs * &g), (entropy, &ours.entropy * &h)];
    let loss = terms.into_iter().filter(|(used, _)| *used).map(|(_, term)| term.sum(Kind::Float)).reduce(|a, b| a + b);
    run_backward(&loss.unwrap()).unwrap();

    let (hidden2, w2) = (x.set_requires_grad(true), w.set_requires_grad(true));
    let l = (hidden2.matmul(&w2.tr()) / temperature).log_softmax(-1, Kind::Float);
    let logprobs = l.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
    let entropies = -(l.exp() * &l).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    assert!((&entropies - &ours.entropy).abs().max().double_value(&[]) < 1e-5);
    (logprobs * g + entropies * h).sum(Kind::Float).backward();
    [(hidden.grad(), gradient), (hidden2.grad(), w2.grad())]
}

#[test]
fn gradients_are_those_of_autograd() {
    for (logprob, entropy) in [(true, false), (false, true), (true, true)] {
        for temperature in [1.0, 0.7] {
            let [ours, torchs] = gradients(9, 40, temperature, logprob, entropy);
            for (ours, torchs) in [(ours.0, torchs.0), (ours.1, torchs.1)] {
                let scale = torchs.abs().max().double_value(&[]);
                assert!(scale > 1e-2, "nothing to compare");
                let worst = (&ours - &torchs).abs().max().double_value(&[]) / scale;
                assert!(worst < 2e-6, "logprob {logprob} entropy {entropy} temperature {temperature}: {worst:e}");
            }
        }
    }
}

/// The logits come in chunks of 256 MiB: 64 rows at a vocabulary of 2^20, over which f32 sums lose three digits.
#[test]
fn chunks_do_not_show() {
    let [ours, torchs] = gradients(65, 1 << 20, 1.0, true, true);
    for row in [0, 63, 64] {
        let (a, b) = (ours.0.get(row), torchs.0.get(row));
        let worst = (&a - &b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]);
        assert!(worst < 2e-3, "row {row}: {worst:e}");
    }
}

/// A token that is impossible (logit -infinity after overflow to f32's ends) has p l = 0, not NaN.
#[test]
fn certainty_has_a_finite_gradient() {
    let hidden = Tensor::from_slice(&[1f32]).view([1, 1]).set_requires_grad(true);
    let w = Tensor::from_slice(&[3e38f32, -3e38]).view([2, 1]);
    let call = NoisyLinearCall::clean(RowKeys::new(vec![0]), true);
    let out = token_logprobs(&hidden, &w, None, &Tensor::from_slice(&[0i64]), 1.0, &call).unwrap();
    run_backward(&out.entropy.sum(Kind::Float)).unwrap();
    assert_eq!(values(&hidden.grad()), [0.0]);
    assert_eq!(values(&out.entropy), [0.0]);
}
