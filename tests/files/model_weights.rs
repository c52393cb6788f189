//! Weights written and read back: bytes, shards, atomicity.

use std::borrow::Cow;

use temper::Error;
use temper::model::checkpoint::{
    Checkpoint, StoredDtype, TensorBytes, TensorSink, TensorSpec, atomic_directory, write_safetensors, write_weights,
};
use temper::model::config::Qwen2Config;

use crate::{listing, shared, tiny_model, write_model};

fn spec(name: &str, dtype: StoredDtype, shape: &[usize]) -> TensorSpec {
    TensorSpec::new(name, dtype, shape)
}

#[test]
fn the_file_has_exactly_these_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let tensors = [
        TensorBytes { spec: spec("b", StoredDtype::U8, &[3]), data: Cow::Borrowed(&[1, 2, 3]) },
        TensorBytes { spec: spec("c", StoredDtype::F32, &[1]), data: Cow::Borrowed(&[0, 0, 128, 63]) },
        TensorBytes { spec: spec("a", StoredDtype::U8, &[0, 2]), data: Cow::Borrowed(&[]) },
    ];
    write_safetensors(&path, &tensors).unwrap();
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"c":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#,
        r#""a":{"dtype":"U8","shape":[0,2],"data_offsets":[4,4]},"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}"#,
    );
    let padded = header.len().next_multiple_of(8);
    let mut expected = (padded as u64).to_le_bytes().to_vec();
    expected.extend(format!("{header:padded$}").bytes());
    expected.extend([0, 0, 128, 63, 1, 2, 3]);
    assert_eq!(std::fs::read(&path).unwrap(), expected);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tensor_f32("c").unwrap(), [1.0]);
    assert_eq!(checkpoint.tensor("b").unwrap().data, [1, 2, 3]);
    assert_eq!(checkpoint.tensor("a").unwrap().shape, [0, 2]);
    let error = checkpoint.tensor_f32("b").unwrap_err().to_string();
    assert!(error.ends_with("tensor b: found dtype U8, expected F32, BF16 or F16"), "{error}");
}

#[test]
fn floats_are_read_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let bf16: Vec<u8> = (0..=u16::MAX).flat_map(|bits| bits.to_le_bytes()).collect();
    let tensors = [
        TensorBytes { spec: spec("bf16", StoredDtype::BF16, &[256, 256]), data: Cow::Borrowed(&bf16) },
        TensorBytes { spec: spec("f16", StoredDtype::F16, &[256, 256]), data: Cow::Borrowed(&bf16) },
    ];
    write_safetensors(&path, &tensors).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (as_bf16, as_f16) = (checkpoint.tensor_f32("bf16").unwrap(), checkpoint.tensor_f32("f16").unwrap());
    for bits in 0..=u16::MAX {
        let expected = f32::from_bits(u32::from(bits) << 16);
        assert!(as_bf16[bits as usize].to_bits() == expected.to_bits() || expected.is_nan());
        let expected = half::f16::from_bits(bits).to_f32();
        assert!(as_f16[bits as usize].to_bits() == expected.to_bits() || expected.is_nan());
    }
}

#[test]
fn shards_hold_what_one_file_holds() {
    let dir = tempfile::tempdir().unwrap();
    let names = ["e", "d", "c", "b", "a"];
    let specs: Vec<TensorSpec> = names.iter().map(|n| spec(n, StoredDtype::F32, &[2, 4])).collect();
    let fill = |index: usize, sink: &mut TensorSink| sink.write(&[index as u8; 32]);
    write_weights(dir.path(), &specs, 64, fill).unwrap();
    assert_eq!(
        listing(dir.path()),
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    let index = std::fs::read_to_string(dir.path().join("model.safetensors.index.json")).unwrap();
    assert!(index.contains("\"total_size\": 160"), "{index}");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
    for (index, name) in names.iter().enumerate() {
        assert_eq!(checkpoint.tensor(name).unwrap().data, [index as u8; 32]);
    }
}

#[test]
fn a_failed_write_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let specs = [spec("a", StoredDtype::U8, &[4]), spec("b", StoredDtype::U8, &[4])];
    let fail = |index: usize, sink: &mut TensorSink| {
        sink.write(&[0; 4])?;
        if index == 1 { Err(Error::Runtime("no more".into())) } else { Ok(()) }
    };
    assert!(write_weights(dir.path(), &specs, 1 << 20, fail).is_err());
    assert!(listing(dir.path()).is_empty());
    let out = dir.path().join("model");
    assert!(atomic_directory(&out, |inside| write_weights(inside, &specs, 1 << 20, fail)).is_err());
    assert!(listing(dir.path()).is_empty());
}

#[test]
fn a_model_directory_agrees_with_its_configuration() {
    let model = tiny_model();
    let config = Qwen2Config::from_dir(model.path()).unwrap();
    Checkpoint::open(model.path()).unwrap().check(&config).unwrap();
    let other = Qwen2Config { intermediate_size: 96, ..config.clone() };
    let error = Checkpoint::open(model.path()).unwrap().check(&other).unwrap_err().to_string();
    let expected = "tensor model.layers.0.mlp.down_proj.weight: found [64, 128], expected [64, 96]";
    assert!(error.ends_with(expected), "{error}");
    let other = Qwen2Config { num_hidden_layers: 3, ..config.clone() };
    let error = Checkpoint::open(model.path()).unwrap().check(&other).unwrap_err().to_string();
    assert!(error.ends_with("tensor model.layers.2.input_layernorm.weight: missing"), "{error}");
    let other = Qwen2Config { num_hidden_layers: 1, ..config.clone() };
    let error = Checkpoint::open(model.path()).unwrap().check(&other).unwrap_err().to_string();
    assert!(error.contains("tensor model.layers.1.input_layernorm.weight: unexpected"), "{error}");
}

#[test]
fn a_tied_head_that_is_also_stored_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let untied =
        Qwen2Config { num_hidden_layers: 1, tie_word_embeddings: false, ..Qwen2Config::preset("tiny-4x64").unwrap() };
    write_model(dir.path(), &untied);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.contains("lm_head.weight"));
    checkpoint.check(&Qwen2Config { tie_word_embeddings: true, ..untied }).unwrap();
}

#[test]
fn the_story_model_opens() {
    let Some(path) = shared("fixtures/stories260k_qwen2") else {
        return;
    };
    let config = Qwen2Config::from_dir(&path).unwrap();
    assert_eq!((config.hidden_size, config.head_dim, config.eos_token_ids.clone()), (64, 8, vec![1]));
    Checkpoint::open(&path).unwrap().check(&config).unwrap();
}
