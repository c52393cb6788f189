//! The error of a matrix product: y' = law(y, s, z), then + bias, then one rounding to the output dtype.
//!
//! `y` f32 [rows, cols] is the clean product; z is keyed by (seed, stream, token key of the row, column), so it does not
//! depend on how rows are batched (numerics.md section 4).

use std::sync::{Arc, Mutex, OnceLock};

use tch::{Device, Kind, Tensor};

use super::cpu;
use super::cuda::noise::{self, Destination, Law, Noisy};
use super::cuda::place::Place;
use crate::numerics::error_law::{ErrorLaw, NoiseSums};
use crate::{Error, Result};

/// Which draw, from which law, at which scale.
#[derive(Clone, Debug)]
pub struct ErrorDraw {
    pub law: ErrorLaw,
    pub scale: f32,
    pub seed: u64,
    pub stream: u32,
}

/// The token keys of a product's rows, on the host and on the device, each made once, on first use.
#[derive(Clone)]
pub struct RowKeys {
    len: usize,
    /// Of consecutive keys: kernels then need no list.
    first: Option<u64>,
    host: Arc<OnceLock<Vec<u64>>>,
    device: Arc<Mutex<Option<Tensor>>>,
}

impl RowKeys {
    pub fn new(keys: Vec<u64>) -> RowKeys {
        RowKeys { len: keys.len(), first: None, host: Arc::new(OnceLock::from(keys)), device: Arc::default() }
    }

    /// first, first + 1, ...: a weight's rows under `noise_key::row_key`.
    pub fn consecutive(first: u64, len: usize) -> RowKeys {
        RowKeys { len, first: Some(first), host: Arc::default(), device: Arc::default() }
    }

    /// Of i64 [rows], the keys' bits on the device that is to read them: the host reads them only if it is asked for them.
    pub fn of_tensor(keys: &Tensor) -> RowKeys {
        let device = Arc::new(Mutex::new(Some(keys.shallow_clone())));
        RowKeys { len: keys.size()[0] as usize, first: None, host: Arc::default(), device }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn host(&self) -> &[u64] {
        self.host.get_or_init(|| match (self.first, self.if_on_device()) {
            (None, Some(tensor)) => {
                let bits =
                    Vec::<i64>::try_from(tensor).expect("a vector of i64 can be read, unless its device is lost");
                bits.into_iter().map(|bits| bits as u64).collect()
            }
            (first, _) => (0..self.len as u64).map(|row| first.unwrap_or(0) + row).collect(),
        })
    }

    /// The first key of `consecutive` ones.
    pub fn first_of_consecutive(&self) -> Option<u64> {
        self.first
    }

    /// The keys of `rows` (positions in this list), in that order.
    pub fn select(&self, rows: &[usize]) -> RowKeys {
        RowKeys::new(rows.iter().map(|&r| self.host()[r]).collect())
    }

    /// The keys of rows start .. start + len.
    pub fn narrow(&self, start: usize, len: usize) -> RowKeys {
        RowKeys::new(self.host()[start..start + len].to_vec())
    }

    /// What `on_device` has made.
    pub fn if_on_device(&self) -> Option<Tensor> {
        self.device.lock().unwrap_or_else(|p| p.into_inner()).as_ref().map(Tensor::shallow_clone)
    }

    /// i64 [rows] on `device` (the same bits).
    pub fn on_device(&self, device: Device) -> Result<Tensor> {
        let mut slot = self.device.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(tensor) = slot.as_ref() {
            return Ok(tensor.shallow_clone());
        }
        let bits: Vec<i64> = self.host().iter().map(|&k| k as i64).collect();
        let tensor = Tensor::f_from_slice(&bits)?.f_to_device(device)?;
        *slot = Some(tensor.shallow_clone());
        Ok(tensor)
    }
}

/// What was measured where noise was added, summed over calls. On CUDA the sums stay on the device until [`take_all`].
///
/// [`take_all`]: SumsSink::take_all
#[derive(Clone, Default)]
pub struct SumsSink(Arc<Mutex<SinkState>>);

#[derive(Default)]
struct SinkState {
    newest: Sums,
    settled: Vec<Sums>,
}

#[derive(Default)]
struct Sums {
    calls: u64,
    on_host: NoiseSums,
    on_device: Option<Tensor>, // of noise::new_sums
}

impl SumsSink {
    fn state(&self) -> std::sync::MutexGuard<'_, SinkState> {
        self.0.lock().unwrap_or_else(|p| p.into_inner())
    }

    pub(super) fn add(&self, sums: &NoiseSums) {
        let newest = &mut self.state().newest;
        newest.calls += 1;
        newest.on_host.merge(sums);
    }

    pub(super) fn device_sums(&self, device: Device) -> Result<Tensor> {
        let newest = &mut self.state().newest;
        newest.calls += 1;
        if let Some(sums) = &newest.on_device {
            return Ok(sums.shallow_clone());
        }
        let sums = noise::new_sums(1, device)?;
        newest.on_device = Some(sums.shallow_clone());
        Ok(sums)
    }

    /// A call more whose sums arrive without it: a CUDA graph has the address of the device's.
    pub fn count_replay(&self) {
        let newest = &mut self.state().newest;
        newest.calls += u64::from(newest.on_device.is_some());
    }

    /// What was measured so far stays, whatever [`forget`](SumsSink::forget) drops.
    pub fn settle(&self) {
        let state = &mut *self.state();
        if state.newest.calls > 0 {
            state.settled.push(std::mem::take(&mut state.newest));
        }
    }

    /// Drops what was measured since it was last settled: work that is to be done again.
    pub fn forget(&self) {
        self.state().newest = Sums::default();
    }

    /// The number of calls of each and their sums since they were last taken; reads the device once for all.
    pub fn take_all(sinks: &[SumsSink]) -> Result<Vec<(u64, NoiseSums)>> {
        let take = |sink: &SumsSink| {
            let SinkState { newest, mut settled } = std::mem::take(&mut *sink.state());
            settled.push(newest);
            settled
        };
        let taken: Vec<Vec<Sums>> = sinks.iter().map(take).collect();
        let on_device: Vec<&Tensor> = taken.iter().flatten().filter_map(|sums| sums.on_device.as_ref()).collect();
        let read = match on_device.is_empty() {
            true => Vec::new(),
            false => noise::read_sums(&Tensor::f_cat(&on_device, 0)?)?,
        };
        let mut read = read.into_iter();
        let merged = taken.iter().map(|parts| {
            let mut all = (0, NoiseSums::default());
            for part in parts {
                all.0 += part.calls;
                all.1.merge(&part.on_host);
                // A row is for the part that has sums on the device, and for no other.
                if let Some(sums) = part.on_device.as_ref().and_then(|_| read.next()) {
                    all.1.merge(&NoiseSums::of_device(sums));
                }
            }
            all
        });
        Ok(merged.collect())
    }
}

/// into += law(y): `y` f32 [rows, cols], `into` f32 [rows, cols] on the same device.
pub fn accumulate_product(
    y: Tensor,
    draw: &ErrorDraw,
    keys: &RowKeys,
    sink: Option<&SumsSink>,
    into: &mut Tensor,
) -> Result<()> {
    let (rows, _) = y.size2()?;
    if let Some(place) = Place::of(&y) {
        return add_on_device(&place, &y, Destination::Add(into), None, draw, keys, sink);
    }
    if rows as usize != keys.len() {
        return Err(Error::Runtime(format!("{} row keys for {rows} rows", keys.len())));
    }
    let sums = accumulate_rows(&y, draw, keys.host(), into)?;
    if let Some(sink) = sink {
        sink.add(&sums);
    }
    Ok(())
}

/// `accumulate_product` of some rows on the CPU; `keys` [rows] are theirs.
pub(super) fn accumulate_rows(y: &Tensor, draw: &ErrorDraw, keys: &[u64], into: &mut Tensor) -> Result<NoiseSums> {
    let (_, cols) = y.size2()?;
    let ErrorDraw { law, scale, seed, stream } = *draw;
    let (y, into) = (cpu::tensor::f32_slice(y)?, cpu::tensor::f32_slice_mut(into)?);
    Ok(cpu::matmul_error::accumulate_f32(law, scale, seed, stream, keys, y, cols as usize, into))
}

/// `y` f32 [rows, cols], consumed (on the CPU an f32 result is y itself); `bias` f32 [cols]; result [rows, cols] of `out_kind` (Float or BFloat16).
/// Without a draw: y + bias, rounded once.
pub fn finish_product(
    mut y: Tensor,
    bias: Option<&Tensor>,
    draw: Option<&ErrorDraw>,
    keys: &RowKeys,
    sink: Option<&SumsSink>,
    out_kind: Kind,
) -> Result<Tensor> {
    let Some(draw) = draw else {
        let y = match bias {
            Some(bias) => y.f_add_(bias)?,
            None => y,
        };
        return Ok(y.f_to_kind(out_kind)?);
    };
    let (rows, cols) = y.size2()?;
    if rows as usize != keys.len() {
        return Err(Error::Runtime(format!("{} token keys for {rows} rows", keys.len())));
    }
    if let Some(place) = Place::of(&y) {
        let out = match out_kind {
            Kind::Float => y.shallow_clone(),
            _ => Tensor::f_empty([rows, cols], (out_kind, y.device()))?,
        };
        add_on_device(&place, &y, Destination::Store(&out), bias, draw, keys, sink)?;
        return Ok(out);
    }
    let bias = bias.map(cpu::tensor::f32_slice).transpose()?;
    let ErrorDraw { law, scale, seed, stream } = *draw;
    let cols = cols as usize;
    let (result, sums) = match out_kind {
        Kind::Float => {
            let values = cpu::tensor::f32_slice_mut(&mut y)?;
            let sums = cpu::matmul_error::apply_f32(law, scale, seed, stream, keys.host(), values, cols, bias);
            (y, sums)
        }
        Kind::BFloat16 => {
            let mut out = Tensor::f_empty([rows, cols as i64], (Kind::BFloat16, Device::Cpu))?;
            let sums = cpu::matmul_error::apply_bf16(
                law,
                scale,
                seed,
                stream,
                keys.host(),
                cpu::tensor::f32_slice(&y)?,
                cols,
                bias,
                cpu::tensor::bf16_slice_mut(&mut out)?,
            );
            (out, sums)
        }
        other => return Err(Error::Runtime(format!("matmul error: output dtype {other:?}"))),
    };
    if let Some(sink) = sink {
        sink.add(&sums);
    }
    Ok(result)
}

fn add_on_device(
    place: &Place,
    y: &Tensor,
    into: Destination,
    bias: Option<&Tensor>,
    draw: &ErrorDraw,
    keys: &RowKeys,
    sink: Option<&SumsSink>,
) -> Result<()> {
    let sums = sink.map(|sink| sink.device_sums(y.device())).transpose()?;
    let law = Law { law: draw.law, seed: draw.seed, sums: sums.as_ref() };
    let noisy = Noisy { y, into, bias, keys, scale: draw.scale, stream: draw.stream };
    noise::add_noise(place, &law, &[noisy])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// As a kernel would: error, error^2, y^2, y^4 and elements of one call.
    fn measure(sink: &SumsSink, value: f64) {
        let row = Tensor::from_slice(&[0.1 * value, value, 2.0 * value, 3.0 * value, 10.0 * value]);
        let _ = sink.device_sums(Device::Cpu).unwrap().get(0).get(7).narrow(0, 0, 5).f_add_(&row).unwrap();
    }

    #[test]
    fn every_sink_takes_its_own_sums_settled_or_not() {
        let sinks: [SumsSink; 4] = Default::default();
        measure(&sinks[0], 1.0);
        sinks[0].settle(); // nothing newer, as after a rollout
        sinks[1].add(&NoiseSums { error_sq: 2.0, clean_sq: 4.0, clean_fourth: 6.0, elements: 20 });
        measure(&sinks[2], 3.0);
        sinks[2].settle();
        measure(&sinks[2], 4.0);
        measure(&sinks[2], 5.0);
        measure(&sinks[3], 8.0);
        sinks[3].forget();
        measure(&sinks[3], 9.0);
        let expected = [(1, 1.0), (1, 2.0), (3, 12.0), (1, 9.0)];
        for ((calls, sums), (expected_calls, value)) in SumsSink::take_all(&sinks).unwrap().into_iter().zip(expected) {
            assert_eq!(calls, expected_calls);
            assert_eq!((sums.error_sq, sums.clean_sq, sums.clean_fourth), (value, 2.0 * value, 3.0 * value));
            assert_eq!(sums.elements, 10 * value as u64);
        }
        assert!(SumsSink::take_all(&sinks).unwrap().iter().all(|(calls, sums)| calls + sums.elements == 0));
    }
}
