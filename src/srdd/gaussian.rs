//! A made checkpoint of Gaussian weights: what formats do to weights without outliers, which trained ones nearly are.

use std::path::Path;

use half::bf16;

use crate::Result;
use crate::model::checkpoint::{StoredDtype, TensorSpec, write_safetensors_with};
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::ops::cpu::normals::normals_into;

const LAYERS: usize = 28;
/// Linears of a layer, [out, in].
const LINEARS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 256, 256),
    ("self_attn.k_proj", 64, 256),
    ("self_attn.v_proj", 64, 256),
    ("self_attn.o_proj", 256, 256),
    ("mlp.gate_proj", 768, 256),
    ("mlp.up_proj", 768, 256),
    ("mlp.down_proj", 256, 768),
];

/// Writes 28 layers of bf16 weights N(0, sigma^2) to the .safetensors file `path`.
pub fn write(path: &Path, sigma: f32) -> Result<()> {
    let in_layer =
        |layer| LINEARS.map(|(name, out, inner)| (format!("model.layers.{layer}.{name}.weight"), out, inner));
    let all: Vec<(String, usize, usize)> = (0..LAYERS).flat_map(in_layer).collect();
    let specs: Vec<TensorSpec> =
        all.iter().map(|(name, out, inner)| TensorSpec::new(name, StoredDtype::BF16, &[*out, *inner])).collect();
    write_safetensors_with(path, &specs, |index, sink| {
        let (_, rows, cols) = all[index];
        let stream = stream(Purpose::Other, Phase::Shared, 0, index as u32)?;
        let mut row = vec![0f32; cols];
        for r in 0..rows {
            normals_into(0, stream, row_key(0, r as u32), &mut row);
            let bytes: Vec<u8> = row.iter().flat_map(|z| bf16::from_f32(sigma * z).to_le_bytes()).collect();
            sink.write(&bytes)?;
        }
        Ok(())
    })
}
