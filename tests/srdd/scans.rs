//! The library's scans.

use std::cell::RefCell;

use tch::{Kind, Tensor};
use temper::Result;
use temper::model::checkpoint::Checkpoint;
use temper::model::pass::{BlockObserver, Pass};
use temper::numerics::block_format;
use temper::numerics::format::Format;
use temper::numerics::tensor_error::{TensorError, TensorErrorSums};
use temper::ops::matmul_error::RowKeys;
use temper::srdd::activations::scan_activations;
use temper::srdd::changes::changes;
use temper::srdd::prompts::{Laid, prompts};
use temper::srdd::sensitivity::{Arm, scan_sensitivity};
use temper::srdd::weights::scan_weights;

use crate::{directory, model};

fn near(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{what}: {found} {expected}");
}

fn same(found: &TensorError, expected: &TensorError, what: &str) {
    near(found.sqnr_db, expected.sqnr_db, what);
    near(found.relative_error, expected.relative_error, what);
    near(found.deadzone_ratio, expected.deadzone_ratio, what);
    near(found.max_abs_error, expected.max_abs_error, what);
}

/// The definition's error of x [rows, cols], row after row.
fn by_rows(x: &[f32], cols: usize, format: Format, keep: impl Fn(usize) -> bool) -> TensorError {
    let mut sums = TensorErrorSums::default();
    for (_, x) in x.chunks(cols).enumerate().filter(|(row, _)| keep(*row)) {
        let q = block_format::fake_quant(x, 1, cols, format);
        sums.add(x, &q.dequantized);
    }
    sums.finish()
}

#[test]
fn weights_have_the_definitions_errors() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&directory(parent.path(), 2)).unwrap();
    let formats: Vec<Format> = ["mxfp4", "fp8", "mxfp4:2d"].map(|f| f.parse().unwrap()).into();
    let mut bytes = 0;
    let scan = scan_weights(&checkpoint, &formats, &mut |piece| {
        bytes += piece;
        Ok(())
    });
    let scan = scan.unwrap();
    assert_eq!(scan.tensors.len(), 2 * 7 * 3);
    assert!(bytes > 0 && scan.nonfinite_blocks == 0);
    for tensor in &scan.tensors {
        let x = checkpoint.tensor_f32(&tensor.name).unwrap();
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let q = block_format::fake_quant(&x, rows, cols, tensor.format);
        let expected = TensorErrorSums::of(&x, &q.dequantized, 0).finish();
        same(&tensor.error, &expected, &format!("{} {}", tensor.name, tensor.format));
    }
    let of_layer = |layer: usize| {
        let prefix = format!("model.layers.{layer}.");
        let own = scan.tensors.iter().filter(|t| t.format == formats[1] && t.name.starts_with(&prefix));
        let errors: Vec<f64> = own.map(|t| t.error.sqnr_db).collect();
        errors.iter().sum::<f64>() / errors.len() as f64
    };
    assert_eq!(scan.formats[1].layers.len(), 2);
    near(scan.formats[1].layers[1].mean.sqnr_db, of_layer(1), "layer 1");
    assert_eq!(scan.wins["sqnr_db"]["fp8"], 2);
}

/// Collects every block's input and output.
#[derive(Default)]
struct Captured(RefCell<Vec<(Tensor, Tensor)>>);

impl BlockObserver for Captured {
    fn observe(&self, _layer: usize, x: &Tensor, y: &Tensor) -> Result<()> {
        self.0.borrow_mut().push((x.shallow_clone(), y.shallow_clone()));
        Ok(())
    }
}

#[test]
fn activations_are_each_layers_output_and_sinks_can_be_left_out() {
    let model = model(3);
    let mut ids = prompts(None, None, &model).unwrap().ids;
    ids.truncate(2);
    // The embedding of one token is made a hundred times larger: a row that dominates.
    let sink = i64::from(ids[0][5]);
    let mut row = model.embed_tokens.value().get(sink);
    let _ = row.g_mul_scalar_(100.0);
    let formats = [Format::NVFP4, Format::MXFP4];
    let scan = scan_activations(&model, &ids, &formats, &mut || Ok(())).unwrap();
    assert_eq!((scan.layers.len(), scan.tokens), (6, 128));
    // By hand, from the blocks' own outputs.
    let captured = Captured::default();
    for (number, ids) in ids.iter().enumerate() {
        let pass = Pass { observer: Some(&captured), ..Pass::clean(RowKeys::new(Vec::new())) };
        let laid = Laid::new(ids, number, &model).unwrap();
        let last = laid.residual(&model, &pass).unwrap();
        let blocks = captured.0.borrow();
        assert_eq!(Vec::<f32>::try_from(last.view(-1)).unwrap(), {
            Vec::<f32>::try_from(blocks.last().unwrap().1.view(-1)).unwrap()
        });
        // A block alone, from its captured input, gives its output.
        let (x, y) = &blocks[blocks.len() - 2];
        let pass = Pass::clean(laid.keys(0).unwrap());
        let again = model.block(1, x, &laid.rotary, &laid.attend(), &pass).unwrap();
        assert_eq!(f64::try_from((again - y).abs().max()).unwrap(), 0.0);
    }
    let captured = captured.0.into_inner();
    for (layer, format) in (0..3).flat_map(|layer| formats.map(|format| (layer, format))) {
        let outputs = [&captured[layer].1, &captured[3 + layer].1];
        let y = Tensor::cat(&outputs, 0);
        let x = Vec::<f32>::try_from(y.view(-1)).unwrap();
        let norms = outputs
            .map(|y| Vec::<f64>::try_from(y.to_kind(Kind::Double).norm_scalaropt_dim(2, [1i64].as_slice(), false)));
        let is_sink: Vec<bool> = norms
            .into_iter()
            .flat_map(|norms| {
                let norms = norms.unwrap();
                let mut sorted = norms.clone();
                sorted.sort_by(f64::total_cmp);
                let median = sorted[(sorted.len() - 1) / 2];
                norms.into_iter().map(|norm| norm > 10.0 * median).collect::<Vec<_>>()
            })
            .collect();
        let found = scan.layers.iter().find(|l| l.layer == layer && l.format == format).unwrap();
        let what = format!("layer {layer} {format}");
        same(&found.error, &by_rows(&x, 64, format, |_| true), &what);
        same(&found.without_sinks, &by_rows(&x, 64, format, |row| !is_sink[row]), &what);
        assert_eq!(found.sink_tokens, is_sink.iter().filter(|sink| **sink).count() as u64, "{what}");
    }
    assert!(scan.layers[0].sink_tokens > 0, "the planted row is a sink");
    for format in ["mxfp4:2d", "nvfp4:sr"] {
        let error = scan_activations(&model, &ids, &[format.parse().unwrap()], &mut || Ok(())).unwrap_err();
        assert!(error.to_string().contains(format), "{error}");
    }
}

#[test]
fn sensitivity_is_zero_without_injection_and_a_window_of_all_layers_is_all() {
    let model = model(3);
    let mut ids = prompts(None, None, &model).unwrap().ids;
    ids.truncate(2);
    let scan = |arm, window| scan_sensitivity(&model, &ids, (arm, window), &mut || Ok(())).unwrap();
    let quantized = scan(Arm::Weights(Format::MXFP4), 1);
    assert_eq!(quantized.layers.len(), 3);
    assert!(quantized.layers.iter().all(|l| l.shift.kl > 1e-6), "{quantized:?}");
    assert!(quantized.all_layers.kl > quantized.layers[0].shift.kl);
    let whole = scan(Arm::Weights(Format::MXFP4), 3);
    assert_eq!(whole.layers.len(), 1);
    near(whole.layers[0].shift.kl, quantized.all_layers.kl, "a window of all");
    let fine = scan(Arm::Weights("mxfp8".parse().unwrap()), 1);
    assert!(fine.all_layers.kl < 0.2 * quantized.all_layers.kl);
    let tiny = scan(Arm::Noise(1e-6), 1);
    assert!(tiny.all_layers.kl.abs() < 1e-6, "{tiny:?}");
    let noisy = scan(Arm::Noise(0.05), 1);
    assert!(noisy.layers.iter().all(|l| l.shift.kl > 1e-6 && l.shift.kl < noisy.all_layers.kl * 1.5));
}

#[test]
fn changes_are_relative_and_by_layer() {
    let parent = tempfile::tempdir().unwrap();
    let before = directory(parent.path(), 2);
    let changed = model(2);
    // Layer 1's up_proj by one percent of itself; a single element of the embedding.
    let mut up = changed.blocks[1].mlp.up_proj.weight.value().shallow_clone();
    let _ = up.g_mul_scalar_(1.01);
    let mut row = changed.embed_tokens.value().get(3).narrow(0, 4, 1);
    let _ = row.g_add_scalar_(1.0);
    let after = parent.path().join("after");
    std::fs::create_dir(&after).unwrap();
    temper::model::load::save_model(&changed, temper::model::section::Dtype::F32, None, &after).unwrap();
    let (before, after) = (Checkpoint::open(&before).unwrap(), Checkpoint::open(&after).unwrap());
    let found = changes(&before, &after, &mut |_| Ok(())).unwrap();
    assert_eq!(found.layers[0].change.relative_change, 0.0);
    let layer: Vec<f32> = before
        .names()
        .filter(|name| name.starts_with("model.layers.1."))
        .flat_map(|name| before.tensor_f32(name).unwrap())
        .collect();
    let up = before.tensor_f32("model.layers.1.mlp.up_proj.weight").unwrap();
    let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let change = &found.layers[1].change;
    assert!((change.relative_change - 0.01 * norm(&up) / norm(&layer)).abs() < 1e-6, "{change:?}");
    assert!((change.changed_elements_ratio - up.len() as f64 / layer.len() as f64).abs() < 1e-3);
    assert!(found.outside_layers.changed_elements_ratio > 0.0 && found.outside_layers.relative_change > 0.0);
}
