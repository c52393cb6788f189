//! The search for faulty layers: what is planted is found, what is healthy is not accused.

use temper::inject::injector::Injector;
use temper::model::qwen2::Qwen2;
use temper::numerics::format::Format;
use temper::srdd::device::Device;
use temper::srdd::fault_finder::{Suspicion, suspects};
use temper::srdd::fault_statistics::Sample;
use temper::srdd::fault_table::fault_table;
use temper::srdd::faults::{FaultScan, scan_faults};
use temper::srdd::planted::{FaultKind, Planted};
use temper::srdd::prompts::{Laid, prompts};
use temper::srdd::sensitivity::{Arm, injecting_all};

use crate::model;

fn laid(model: &Qwen2) -> Vec<Laid> {
    let ids = prompts(None, None, model).unwrap().ids;
    ids.iter().enumerate().map(|(number, ids)| Laid::new(ids, number, model).unwrap()).collect()
}

fn scan(model: &Qwen2, arm: Option<Arm>, planted: Option<Planted>) -> FaultScan {
    let plan = arm.map(|arm| injecting_all(&model.config.modules(), arm).unwrap());
    let injector = plan.map(|plan| Injector::applying(plan.clone(), plan, 1));
    model.invalidate();
    let (clean, device) =
        (Device::new(model, None, None).unwrap(), Device::new(model, injector.as_ref(), planted).unwrap());
    scan_faults(&clean, &device, "test", &laid(model), &mut || Ok(())).unwrap()
}

#[test]
fn every_kind_is_found_in_every_layer_and_nobody_else_is_accused() {
    let model = model(4);
    let clean = Device::new(&model, None, None).unwrap();
    let rows = fault_table(&clean, &laid(&model), 2, &mut || Ok(())).unwrap();
    assert_eq!(rows.len(), 10);
    for row in rows {
        assert!(row.cases + row.inert == 8 && row.cases >= 6, "{row:?}");
        assert_eq!((row.first, row.kind_right, row.others_accused), (row.cases, row.cases, 0), "{row:?}");
        assert!(row.least_severity.unwrap() < row.kind.severity(), "{row:?}");
    }
}

#[test]
fn the_device_itself_is_searched() {
    let model = model(4);
    let planted = |kind: FaultKind| Planted { kind, severity: kind.severity(), layer: 2, sparse: false, seed: 0 };
    for kind in FaultKind::ALL {
        let found = scan(&model, None, Some(planted(kind)));
        assert_eq!(found.suspects.len(), 1, "{kind:?}: {:?}", found.suspects);
        assert!(found.suspects[0].layer == 2 && found.suspects[0].kind.is(kind), "{kind:?}: {:?}", found.suspects);
        // Probes that need no judgement.
        let probe = &found.probes[2];
        let is_random = matches!(kind, FaultKind::Noise | FaultKind::Spikes);
        assert_eq!(probe.instability > 0.0, is_random, "{kind:?}");
        if is_random {
            assert!(found.robust_z[2]["instability"].value > 100.0, "{kind:?}");
        }
        assert_eq!(probe.pile_up_ratio > 2.5 * found.probes[1].pile_up_ratio, kind == FaultKind::Clip, "{kind:?}");
    }
    // In a device that suffers everywhere as well.
    let found = scan(&model, Some(Arm::Weights(Format::MXFP4)), Some(planted(FaultKind::Spikes)));
    assert!(found.suspects[0].layer == 2 && found.suspects[0].kind == Suspicion::Spikes, "{:?}", found.suspects);
}

#[test]
fn healthy_devices_are_not_accused() {
    for layers in [1, 2, 4] {
        let model = model(layers);
        let arms = [None, Some(Arm::Weights(Format::MXFP4)), Some(Arm::Weights(Format::NVFP4)), Some(Arm::Noise(0.05))];
        for arm in arms {
            let found = scan(&model, arm, None);
            assert!(found.suspects.is_empty(), "{layers} layers, {arm:?}: {:?}", found.suspects);
            assert_eq!((found.probes.len(), found.robust_z.len()), (layers, layers));
        }
    }
}

#[test]
fn a_single_layer_is_judged_by_absolute_signs() {
    let model = model(1);
    for kind in FaultKind::ALL {
        let planted = Planted { kind, severity: kind.severity(), layer: 0, sparse: false, seed: 0 };
        let found = scan(&model, None, Some(planted));
        assert!(found.suspects.len() == 1 && found.suspects[0].kind.is(kind), "{kind:?}: {:?}", found.suspects);
    }
}

#[test]
fn nan_on_the_device_alone_is_a_fault() {
    let x = [0.5f32; 16];
    let y: Vec<f32> = (0..16).map(|i| i as f32 / 7.0).collect();
    let mut broken = y.clone();
    broken[3] = f32::NAN;
    let of =
        |d: &[f32]| Sample { x: &x, y: &y, d: [d, d], hidden: 4, prompts: std::slice::from_ref(&(0..4)) }.statistics();
    let found = suspects(&[of(&y), of(&broken), of(&y)]);
    assert!(found.len() == 1 && found[0].layer == 1 && found[0].kind == Suspicion::Nonfinite, "{found:?}");
}
