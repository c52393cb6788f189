//! AdamW by hand, against torch.optim.AdamW, and its state.

use tch::{Kind, Tensor};
use temper::rl::optimizer::{AdamW, ParamRef};
use temper::rl::section::OptimizerSection;

fn param<'a>(name: &'a str, master: &'a Tensor, grad: &'a Tensor) -> ParamRef<'a> {
    ParamRef { name, master, grad, is_norm_or_bias: false }
}

fn values(t: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(t.contiguous().view([-1])).unwrap()
}

/// First update, by hand: m = .1 g, v = .001 g^2, so m/(1 - .9) = g and sqrt(v/(1 - .999)) = |g|: the step is
/// lr * g/(|g| + eps), whatever g. w = 1, lr = .1, decay .5: 1 * (1 - .05) = .95, then -+.1.
#[test]
fn the_first_update_by_hand() {
    let config = OptimizerSection { lr: 0.1, weight_decay: 0.5, grad_clip: None, ..OptimizerSection::default() };
    let mut optimizer = AdamW::new(config).unwrap();
    let w = Tensor::from_slice(&[1f32, 1.0, 1.0]);
    let g = Tensor::from_slice(&[3f32, -0.02, 0.0]);
    let outcome = optimizer.step(&mut [param("w", &w, &g)], 0.1).unwrap();
    for (got, want) in values(&w).iter().zip([0.85f32, 1.05, 0.95]) {
        assert!((got - want).abs() < 1e-6, "{got} {want}");
    }
    assert!((outcome.grad_norm - 9.0004f64.sqrt()).abs() < 1e-6);
    assert_eq!(values(&g), [3.0, -0.02, 0.0], "the gradient is only read");
}

/// Norm sqrt(9 + 16) = 5 over both parameters: a limit of 1 scales by 1/(5 + 1e-6), a limit of 6 by 1.
#[test]
fn clipping_is_global() {
    for (limit, want) in [(Some(1.0), 0.2), (Some(6.0), 1.0), (None, 1.0)] {
        let mut optimizer = AdamW::new(OptimizerSection { grad_clip: limit, ..OptimizerSection::default() }).unwrap();
        let (w, b) = (Tensor::from_slice(&[1f32]), Tensor::from_slice(&[1f32]));
        let (gw, gb) = (Tensor::from_slice(&[3f32]), Tensor::from_slice(&[-4f32]));
        let outcome = optimizer.step(&mut [param("w", &w, &gw), param("b", &b, &gb)], 0.1).unwrap();
        assert!((outcome.grad_norm - 5.0).abs() < 1e-12);
        assert!((outcome.clip_coefficient - want).abs() < 1e-6);
        let (_, m) = &optimizer.state_tensors()[1];
        assert!((f64::from(values(m)[0]) - 0.1 * 3.0 * want).abs() < 1e-6, "exp_avg.w = (1 - beta1) * clipped g");
    }
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    for poison in [f32::NAN, f32::INFINITY] {
        let mut optimizer = AdamW::new(OptimizerSection::default()).unwrap();
        let w = Tensor::from_slice(&[1f32, 2.0]);
        let good = Tensor::from_slice(&[1f32, 1.0]);
        let bad = Tensor::from_slice(&[1f32, poison]);
        optimizer.step(&mut [param("w", &w, &good)], 0.1).unwrap();
        let before: Vec<_> = optimizer.state_tensors().iter().map(|(_, t)| values(t)).collect();
        let weights = values(&w);
        let outcome = optimizer.step(&mut [param("w", &w, &bad)], 0.1).unwrap();
        assert!(outcome.skipped && !outcome.grad_norm.is_finite());
        assert_eq!(values(&w), weights);
        let after: Vec<_> = optimizer.state_tensors().iter().map(|(_, t)| values(t)).collect();
        assert_eq!(before, after);
        assert_eq!((optimizer.counters().step, optimizer.counters().skipped_steps), (1, 1));
    }
}

/// lr 1, three warm-up updates: 1/3, 2/3, 1, 1.
#[test]
fn warm_up() {
    let mut optimizer =
        AdamW::new(OptimizerSection { lr: 1.0, warmup_steps: 3, ..OptimizerSection::default() }).unwrap();
    let (w, g) = (Tensor::from_slice(&[1f32]), Tensor::from_slice(&[1f32]));
    for want in [1.0 / 3.0, 2.0 / 3.0, 1.0, 1.0] {
        assert!((optimizer.next_lr() - want).abs() < 1e-15);
        optimizer.step(&mut [param("w", &w, &g)], 1e-3).unwrap();
    }
}

#[test]
fn norms_and_biases_can_be_spared_the_decay() {
    for (spared, want) in [(true, 1.0f32), (false, 0.95)] {
        let config =
            OptimizerSection { weight_decay: 0.5, decay_norms_and_biases: !spared, ..OptimizerSection::default() };
        let mut optimizer = AdamW::new(config).unwrap();
        let (w, g) = (Tensor::from_slice(&[1f32]), Tensor::from_slice(&[0f32]));
        let norm = ParamRef { is_norm_or_bias: true, ..param("model.norm.weight", &w, &g) };
        optimizer.step(&mut [norm], 0.1).unwrap();
        assert!((values(&w)[0] - want).abs() < 1e-7);
    }
}

/// Saved after 3 updates and loaded into a new optimizer, 4 more give the same bits as 7 in one go.
#[test]
fn resume_is_bitwise() {
    let run = |resume: bool| {
        let config = OptimizerSection { lr: 0.03, warmup_steps: 5, ..OptimizerSection::default() };
        let mut optimizer = AdamW::new(config.clone()).unwrap();
        let w = (Tensor::arange(40, (Kind::Float, tch::Device::Cpu)) * 0.1 - 2.0).view([5, 8]);
        for step in 0..7 {
            if step == 3 && resume {
                let (counters, tensors) = (optimizer.counters(), optimizer.state_tensors());
                optimizer = AdamW::new(config.clone()).unwrap();
                optimizer.load_state(counters, tensors).unwrap();
            }
            let g = (&w * 1.7 + f64::from(step)).sin();
            let lr = optimizer.next_lr();
            optimizer.step(&mut [param("w", &w, &g)], lr).unwrap();
        }
        let state: Vec<_> = optimizer.state_tensors().into_iter().map(|(n, t)| (n, values(&t))).collect();
        (values(&w), state, optimizer.counters())
    };
    assert_eq!(run(false), run(true));
}

/// A large parameter (more than one chunk) gives every element the same update as a small one does.
#[test]
fn chunks_do_not_show() {
    let n = (1 << 22) + 5;
    let mut optimizer = AdamW::new(OptimizerSection { grad_clip: None, ..OptimizerSection::default() }).unwrap();
    let large = Tensor::ones([n], (Kind::Float, tch::Device::Cpu));
    let small = Tensor::from_slice(&[1f32]);
    for step in 0..3 {
        let (gl, gs) =
            (Tensor::full([n], 0.3 + f64::from(step), (Kind::Float, tch::Device::Cpu)), 0.3 + f64::from(step));
        let gs = Tensor::from_slice(&[gs as f32]);
        optimizer.step(&mut [param("large", &large, &gl), param("small", &small, &gs)], 0.1).unwrap();
    }
    let (low, high) = (large.min().double_value(&[]), large.max().double_value(&[]));
    assert_eq!((low, high), (small.double_value(&[0]), small.double_value(&[0])));
}

#[test]
fn wrong_state_and_parameters_are_refused() {
    let mut optimizer = AdamW::new(OptimizerSection::default()).unwrap();
    let (w, g) = (Tensor::from_slice(&[1f32]), Tensor::from_slice(&[1f32]));
    let wide = Tensor::from_slice(&[1f32, 2.0]);
    let refused = |e: temper::Error, says: &str| assert!(e.to_string().contains(says), "{e}");
    refused(optimizer.step(&mut [param("w", &w, &wide)], 0.1).unwrap_err(), "gradient of shape");
    refused(optimizer.step(&mut [param("w", &w, &g), param("w", &w, &g)], 0.1).unwrap_err(), "twice");
    let half = w.to_kind(Kind::BFloat16);
    refused(optimizer.step(&mut [param("w", &half, &g)], 0.1).unwrap_err(), "f32");
    optimizer.step(&mut [param("w", &w, &g)], 0.1).unwrap();
    refused(optimizer.step(&mut [param("other", &w, &g)], 0.1).unwrap_err(), "other");
    refused(optimizer.step(&mut [param("w", &wide, &wide)], 0.1).unwrap_err(), "shape");
    refused(optimizer.step(&mut [], 0.1).unwrap_err(), "no parameter w");
    let (counters, state) = (optimizer.counters(), optimizer.state_tensors());
    refused(optimizer.load_state(counters, vec![]).unwrap_err(), "no tensors");
    let first = |name: &str| vec![(name.to_string(), state[0].1.shallow_clone())];
    refused(optimizer.load_state(counters, first("exp_avg.w")).unwrap_err(), "without exp_avg_sq.w");
    refused(optimizer.load_state(counters, first("exp_avg_sq.w")).unwrap_err(), "without exp_avg.w");
    refused(optimizer.load_state(counters, first("momentum.w")).unwrap_err(), "momentum.w");
    for (config, key) in [
        (OptimizerSection { lr: -1.0, ..OptimizerSection::default() }, "optimizer.lr"),
        (OptimizerSection { betas: [0.9, 1.0], ..OptimizerSection::default() }, "optimizer.betas"),
        (OptimizerSection { grad_clip: Some(0.0), ..OptimizerSection::default() }, "optimizer.grad_clip"),
    ] {
        refused(AdamW::new(config).unwrap_err(), key);
    }
}
