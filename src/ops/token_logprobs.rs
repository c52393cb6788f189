//! Log-probability and entropy of given tokens, in chunks of rows, so that [tokens, vocab] never exists at once.
//!
//! logits = hidden W^T (a noisy linear product, f32), l = log_softmax(logits / temperature),
//! logprob[t] = l[t, target[t]], entropy H[t] = -sum_v p l with p = exp(l). Backward recomputes each chunk (the noise replays
//! from its keys): dlogits = (g (onehot - p) - h p (l + H)) / temperature, with g and h the gradients of logprob and H.
//! Where nobody asks for the entropy's gradient, nothing of it is computed.
//!
//! Shapes: hidden [tokens, hidden], W [vocab, hidden], targets i64 [tokens]; results f32 [tokens].

use tch::{Kind, Tensor};

use super::autograd::{Backward, attach};
use super::matmul_error::accumulate_product;
use super::noisy_linear::{self, NoisyLinearCall, WeightGradientError};
use crate::Result;

/// Upper bound of one chunk of f32 logits, in bytes.
pub const CHUNK_BYTES: usize = 256 << 20;

/// Both differentiable.
pub struct TokenLogprobs {
    pub logprobs: Tensor, // f32 [tokens]
    pub entropy: Tensor,  // f32 [tokens]
}

#[derive(Clone)]
struct Head {
    call: NoisyLinearCall,
    temperature: f64,
    chunk_rows: usize,
}

impl Head {
    fn chunk_call(&self, start: usize, rows: usize) -> NoisyLinearCall {
        NoisyLinearCall { keys: self.call.keys.narrow(start, rows), ..self.call.clone() }
    }

    /// log_softmax(logits / temperature) of rows start .. start + rows: f32 [rows, vocab].
    fn log_softmax(&self, hidden: &Tensor, weight: &Tensor, start: usize, record: bool) -> Result<Tensor> {
        let rows = hidden.size()[0] as usize;
        let call = self.chunk_call(start, rows);
        let logits = noisy_linear::forward(hidden, weight, None, &call, record, Kind::Float)?;
        let logits = if self.temperature == 1.0 { logits } else { logits.f_div_scalar(self.temperature)? };
        Ok(logits.f_log_softmax(-1, Kind::Float)?)
    }

    /// (start, rows) of each chunk.
    fn chunks(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let step = self.chunk_rows;
        (0..rows).step_by(step).map(move |start| (start, step.min(rows - start)))
    }
}

struct LogprobsBackward {
    head: Head,
    gradient: Option<Tensor>, // f32 [vocab, hidden], shared with the parameter
}

impl Backward for LogprobsBackward {
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let ([of_logprobs, of_entropy], [hidden, weight, targets]) = (grads, saved) else {
            return Ok(vec![None, None]);
        };
        if of_logprobs.is_none() && of_entropy.is_none() {
            return Ok(vec![None, None]);
        }
        // dW is one product over all chunks: an error of its own is drawn once, on the sum.
        let dw_error = self.head.call.dw.as_ref();
        let mut dw = match (&self.gradient, dw_error) {
            (Some(gradient), Some(_)) => Some(gradient.f_zeros_like()?),
            (gradient, _) => gradient.as_ref().map(Tensor::shallow_clone),
        };
        let mut dx = Vec::new();
        for (start, rows) in self.head.chunks(hidden.size()[0] as usize) {
            let (from, len) = (start as i64, rows as i64);
            let x = hidden.f_narrow(0, from, len)?;
            let target = targets.f_narrow(0, from, len)?.f_unsqueeze(1)?;
            let l = self.head.log_softmax(&x, weight, start, false)?;
            let rows_of = |gradient: &Tensor| -> Result<Tensor> {
                let gradient = gradient.f_narrow(0, from, len)?.f_unsqueeze(1)?;
                Ok(gradient.f_mul_scalar(-1.0 / self.head.temperature)?)
            };
            let entropy_part = match of_entropy {
                Some(h) => Some(entropy_dlogits(&l)?.f_mul_(&rows_of(h)?)?),
                None => None,
            };
            let logprob_part = match of_logprobs {
                Some(g) => {
                    let minus_one = Tensor::f_full([len, 1], -1.0, (Kind::Float, hidden.device()))?;
                    let mut softmax = l;
                    Some(softmax.f_exp_()?.f_scatter_add(1, &target, &minus_one)?.f_mul_(&rows_of(g)?)?)
                }
                None => None,
            };
            let dlogits = match (logprob_part, entropy_part) {
                (Some(mut both), Some(entropy)) => both.f_add_(&entropy)?,
                (Some(one), None) | (None, Some(one)) => one,
                (None, None) => continue,
            };
            let dlogits = dlogits.f_to_kind(hidden.kind())?;
            let call = self.head.chunk_call(start, rows);
            if needs[0] {
                dx.push(noisy_linear::backward_dx(&dlogits, weight, &call)?);
            }
            if let Some(dw) = &mut dw {
                noisy_linear::accumulate_dw(&dlogits, &x, &NoisyLinearCall { dw: None, ..call }, dw)?;
            }
        }
        if let (Some(gradient), Some(WeightGradientError { error, keys }), Some(dw)) = (&self.gradient, dw_error, dw) {
            let mut gradient = gradient.shallow_clone();
            match &error.draw {
                Some(draw) => accumulate_product(dw, draw, keys, error.sink.as_ref(), &mut gradient)?,
                None => drop(gradient.f_add_(&dw)?),
            }
        }
        let dx = if dx.is_empty() { None } else { Some(Tensor::f_cat(&dx, 0)?) };
        Ok(vec![dx, None])
    }
}

/// `anchor` as in [`noisy_linear::noisy_linear`].
pub fn token_logprobs(
    hidden: &Tensor,
    weight: &Tensor,
    anchor: Option<(&Tensor, &Tensor)>,
    targets: &Tensor,
    temperature: f64,
    call: &NoisyLinearCall,
) -> Result<TokenLogprobs> {
    let vocab = weight.size()[0] as usize;
    let head = Head { call: call.clone(), temperature, chunk_rows: (CHUNK_BYTES / (4 * vocab)).max(1) };
    let rows = hidden.size()[0] as usize;
    let (logprobs, entropy) = tch::no_grad(|| -> Result<(Tensor, Tensor)> {
        let (mut logprobs, mut entropies) = (Vec::new(), Vec::new());
        for (start, len) in head.chunks(rows) {
            let x = hidden.f_narrow(0, start as i64, len as i64)?;
            let target = targets.f_narrow(0, start as i64, len as i64)?.f_unsqueeze(1)?;
            let l = head.log_softmax(&x, weight, start, true)?;
            logprobs.push(l.f_gather(1, &target, false)?.f_squeeze_dim(1)?);
            entropies.push(p_log_p(&l)?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?.f_neg()?);
        }
        Ok((Tensor::f_cat(&logprobs, 0)?, Tensor::f_cat(&entropies, 0)?))
    })?;
    let inputs = [hidden, anchor.map_or(weight, |(master, _)| master)];
    if !call.differentiable || inputs.iter().all(|t| !t.requires_grad()) {
        return Ok(TokenLogprobs { logprobs, entropy });
    }
    let operation = LogprobsBackward { head, gradient: anchor.map(|(_, gradient)| gradient.shallow_clone()) };
    let saved = [&hidden.detach(), &weight.detach(), targets];
    let mut outputs = attach(&inputs, &saved, &[&logprobs, &entropy], operation)?.into_iter();
    let (logprobs, entropy) = (outputs.next().unwrap_or(logprobs), outputs.next().unwrap_or(entropy));
    Ok(TokenLogprobs { logprobs, entropy })
}

/// p l of log-probabilities l, 0 where p is (there l may be -infinity).
fn p_log_p(l: &Tensor) -> Result<Tensor> {
    Ok(l.f_exp()?.f_mul_(&l.f_clamp_min(f64::from(f32::MIN))?)?)
}

/// p (l + H) of log-probabilities l [rows, vocab], H = -sum p l of each row: minus dH/dlogits.
fn entropy_dlogits(l: &Tensor) -> Result<Tensor> {
    let mut p_l = p_log_p(l)?;
    let minus_entropy = p_l.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?;
    Ok(p_l.f_sub_(&l.f_exp()?.f_mul_(&minus_entropy)?)?)
}
