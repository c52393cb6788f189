//! What formats would do to the residual stream after each layer, per token: every row has its own blocks and its own tensor
//! amax. All layers are seen in one forward pass a prompt.
//!
//! One attention-sink token can hold most of a layer's power, so the metrics also come without such rows: those whose norm is
//! more than ten times the median row's.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::Serialize;
use tch::{Kind, Tensor};

use super::prompts::Laid;
use super::summary::{Entry, FormatSummary, by_format, wins};
use crate::model::pass::{BlockObserver, Pass};
use crate::model::qwen2::Qwen2;
use crate::numerics::block_format::TensorScale;
use crate::numerics::format::Format;
use crate::numerics::tensor_error::{TensorError, TensorErrorSums};
use crate::ops::fake_quant::fake_quant_with_errors;
use crate::ops::matmul_error::RowKeys;
use crate::{Result, bail_input};

const SINK_RATIO: f64 = 10.0;

#[derive(Clone, Debug, Serialize)]
pub struct ActivationScan {
    pub layers: Vec<LayerError>,
    pub formats: Vec<FormatSummary>,
    pub wins: BTreeMap<&'static str, BTreeMap<String, usize>>,
    pub tokens: u64,
}

/// A format's error in one layer's output.
#[derive(Clone, Debug, Serialize)]
pub struct LayerError {
    pub layer: usize,
    pub format: Format,
    #[serde(flatten)]
    pub error: TensorError,
    pub without_sinks: TensorError,
    pub sink_tokens: u64,
}

#[derive(Clone, Copy, Default)]
struct Sums {
    all: TensorErrorSums,
    without_sinks: TensorErrorSums,
    sink_tokens: u64,
}

struct Observer<'a> {
    formats: &'a [Format],
    sums: RefCell<BTreeMap<(usize, usize), Sums>>, // by format and layer
}

impl BlockObserver for Observer<'_> {
    fn observe(&self, layer: usize, _x: &Tensor, y: &Tensor) -> Result<()> {
        let norms = y.f_to_kind(Kind::Float)?.f_norm_scalaropt_dim(2.0, [1i64].as_slice(), false)?;
        let sinks = norms.f_gt_tensor(&norms.f_median()?.f_mul_scalar(SINK_RATIO)?)?;
        let rest = sinks.f_logical_not()?.f_nonzero()?.f_squeeze_dim(1)?;
        let count = i64::try_from(sinks.f_sum(Kind::Int64)?)? as u64;
        for (number, &format) in self.formats.iter().enumerate() {
            let sums_of = |y: &Tensor| Ok(fake_quant_with_errors(y, format, TensorScale::Row, None)?.1);
            let all: TensorErrorSums = sums_of(&y.f_contiguous()?)?;
            let without_sinks: Result<TensorErrorSums> =
                if count == 0 { Ok(all) } else { sums_of(&y.f_index_select(0, &rest)?) };
            let mut sums = self.sums.borrow_mut();
            let sums = sums.entry((number, layer)).or_default();
            sums.all.merge(&all);
            sums.without_sinks.merge(&without_sinks?);
            sums.sink_tokens += count;
        }
        Ok(())
    }
}

/// # Errors
/// `Input` for a format that activations cannot have: stochastic ones have no draw here, and a 2-D tile would mix tokens.
pub fn scan_activations(
    model: &Qwen2,
    prompts: &[Vec<u32>],
    formats: &[Format],
    progress: &mut dyn FnMut() -> Result<()>,
) -> Result<ActivationScan> {
    if let Some(format) = formats.iter().find(|f| f.two_d || f.rounding.is_stochastic()) {
        bail_input!("--activations: found format {format}, expected one without 2d, sr and sr8");
    }
    let _no_grad = tch::no_grad_guard();
    let observer = Observer { formats, sums: RefCell::default() };
    for (number, ids) in prompts.iter().enumerate() {
        let pass = Pass { observer: Some(&observer), ..Pass::clean(RowKeys::new(Vec::new())) };
        let _last = Laid::new(ids, number, model)?.residual(model, &pass)?;
        progress()?;
    }
    let layers = observer.sums.into_inner().into_iter().map(|((number, layer), sums)| LayerError {
        layer,
        format: formats[number],
        error: sums.all.finish(),
        without_sinks: sums.without_sinks.finish(),
        sink_tokens: sums.sink_tokens,
    });
    let layers: Vec<LayerError> = layers.collect();
    let entries: Vec<Entry> =
        layers.iter().map(|l| Entry { layer: Some(l.layer), format: l.format, error: l.error }).collect();
    let formats = by_format(&entries);
    let tokens = prompts.iter().map(|ids| ids.len() as u64).sum();
    Ok(ActivationScan { wins: wins(&formats), formats, layers, tokens })
}
