//! Our backward passes inside torch's autograd: errors come back as themselves, panics as one line, payloads are
//! dropped exactly once, and whatever happened, the next backward works.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tch::{Device, Kind, Tensor};
use temper::ops::autograd::{Backward, attach, run_backward};
use temper::{Error, Result};

#[derive(Clone, Copy)]
enum Behaviour {
    Double,
    Fail(usize),
    Panic(&'static str),
    WrongCount,
    WrongShape,
}

/// y = 2x, with a backward pass that behaves as told; counts how often it was dropped.
struct Operation {
    behaviour: Behaviour,
    drops: Arc<AtomicUsize>,
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::SeqCst);
    }
}

impl Backward for Operation {
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        assert_eq!((saved.len(), grads.len(), needs), (1, 1, [true].as_slice()));
        match self.behaviour {
            Behaviour::Double => Ok(vec![grads[0].as_ref().map(|g| g * 2.0)]),
            Behaviour::Fail(number) => Err(Error::Input(format!("weight {number}: found bf16, expected f32"))),
            Behaviour::Panic(text) => panic!("{text}"),
            Behaviour::WrongCount => Ok(vec![None, None]),
            Behaviour::WrongShape => Ok(vec![Some(Tensor::ones([7, 7], (Kind::Float, Device::Cpu)))]),
        }
    }
}

fn leaf() -> Tensor {
    Tensor::from_slice(&[1f32, 2.0, 3.0]).set_requires_grad(true)
}

fn apply(x: &Tensor, behaviour: Behaviour) -> (Tensor, Arc<AtomicUsize>) {
    let drops = Arc::new(AtomicUsize::new(0));
    let operation = Operation { behaviour, drops: drops.clone() };
    let out = tch::no_grad(|| x * 2.0);
    let y = attach(&[x], &[&x.detach()], &[&out], operation).unwrap().remove(0);
    (y, drops)
}

/// Runs backward through one operation; everything of it is gone afterwards.
fn outcome(behaviour: Behaviour) -> Result<Vec<f32>> {
    let x = leaf();
    let (y, drops) = apply(&x, behaviour);
    let result = run_backward(&y.sum(Kind::Float)).map(|()| Vec::<f32>::try_from(x.grad()).unwrap());
    drop(y);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
    result
}

#[test]
fn an_error_comes_back_as_itself() {
    match outcome(Behaviour::Fail(3)) {
        Err(Error::Input(text)) => assert_eq!(text, "weight 3: found bf16, expected f32"),
        other => panic!("{other:?}"),
    }
    assert_eq!(outcome(Behaviour::Double).unwrap(), [2.0, 2.0, 2.0], "and a later backward works");
}

#[test]
fn a_panic_becomes_one_line() {
    match outcome(Behaviour::Panic("index out of range\nsecond line")) {
        Err(Error::Runtime(text)) => {
            assert_eq!(text, "an operation panicked in backward: index out of range");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(outcome(Behaviour::Double).unwrap(), [2.0, 2.0, 2.0]);
}

#[test]
fn wrong_results_are_errors_of_one_line() {
    for behaviour in [Behaviour::WrongCount, Behaviour::WrongShape] {
        let text = outcome(behaviour).unwrap_err().to_string();
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    assert_eq!(outcome(Behaviour::Double).unwrap(), [2.0, 2.0, 2.0]);
}

/// The failing operation lies below others: they ran, it did not, and nothing leaks.
#[test]
fn an_error_deep_in_the_graph_stops_the_pass() {
    let x = leaf();
    let (a, below) = apply(&x, Behaviour::Fail(8));
    let (b, above) = apply(&(a.shallow_clone() * 3.0), Behaviour::Double);
    let error = run_backward(&b.sum(Kind::Float)).unwrap_err();
    assert_eq!(error.to_string(), "weight 8: found bf16, expected f32");
    assert!(!x.grad().defined());
    drop((a, b));
    assert_eq!((below.load(Ordering::SeqCst), above.load(Ordering::SeqCst)), (1, 1));
}

#[test]
fn a_payload_is_dropped_once_without_a_backward_too() {
    let (y, drops) = apply(&leaf(), Behaviour::Double);
    assert_eq!(drops.load(Ordering::SeqCst), 0, "the graph holds it");
    drop(y);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
    // Nothing wants a gradient, so there is no graph to hold it.
    let (y, drops) = apply(&Tensor::from_slice(&[1f32]), Behaviour::Double);
    assert!(!y.requires_grad());
    drop(y);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

#[test]
fn a_second_backward_through_a_freed_graph_is_an_error() {
    let x = leaf();
    let (y, drops) = apply(&x, Behaviour::Double);
    let loss = y.sum(Kind::Float);
    run_backward(&loss).unwrap();
    let text = run_backward(&loss).unwrap_err().to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    drop((y, loss));
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

/// Each caller gets the error of its own backward.
#[test]
fn errors_of_several_threads_are_not_mixed_up() {
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            scope.spawn(move || {
                for i in 0..50 {
                    let number = 1000 * thread + i;
                    match outcome(Behaviour::Fail(number)) {
                        Err(Error::Input(text)) => {
                            assert_eq!(text, format!("weight {number}: found bf16, expected f32"));
                        }
                        other => panic!("{other:?}"),
                    }
                    assert!(outcome(Behaviour::Double).is_ok());
                }
            });
        }
    });
}
