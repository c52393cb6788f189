//! One trainable tensor: the value that products use, its f32 master, its f32 gradient.
//!
//! Matrices (`Matrix`) accumulate their gradient in a buffer of ours, written by the operations themselves, so that a
//! bf16 `.grad` never accumulates. Vectors (norm weights, biases) are f32 leaves of torch's graph.

use tch::{Device, Kind, Tensor};

use crate::Result;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Matrix,
    /// A norm's weight or a bias: computed in f32 whatever the model's dtype.
    Vector,
}

pub struct Parameter {
    pub name: String,
    pub role: Role,
    value: Tensor,          // what the forward pass reads; shares memory with the master where both are f32
    master: Option<Tensor>, // f32 leaf; None: frozen
    gradient: Option<Tensor>, // f32, Matrix only
}

impl Parameter {
    pub fn frozen(name: &str, role: Role, value: Tensor, kind: Kind) -> Result<Parameter> {
        let kind = if role == Role::Vector { Kind::Float } else { kind };
        let value = value.f_to_kind(kind)?.f_contiguous()?;
        Ok(Parameter { name: name.to_string(), role, value, master: None, gradient: None })
    }

    /// Gives the parameter an f32 master and, for a matrix, a gradient buffer of zeros.
    pub fn make_trainable(&mut self) -> Result<()> {
        let master = self.value.f_to_kind(Kind::Float)?;
        if self.value.kind() == Kind::Float {
            self.value = master.shallow_clone();
        }
        if self.role == Role::Matrix {
            self.gradient = Some(master.f_zeros_like()?);
        }
        self.master = Some(master.detach().set_requires_grad(true));
        Ok(())
    }

    /// The tensor of the forward pass, without gradient.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The f32 leaf for torch's graph (Vector), or the value where frozen.
    pub fn leaf(&self) -> &Tensor {
        self.master.as_ref().unwrap_or(&self.value)
    }

    /// The f32 master and the gradient buffer of a trainable matrix.
    pub fn anchor(&self) -> Option<(&Tensor, &Tensor)> {
        self.master.as_ref().zip(self.gradient.as_ref())
    }

    /// The f32 master, without gradient; None where frozen.
    pub fn master(&self) -> Option<Tensor> {
        self.master.as_ref().map(Tensor::detach)
    }

    /// The value before it was rounded for the products: the master, or where frozen the value itself.
    pub fn exact(&self) -> Tensor {
        self.master().unwrap_or_else(|| self.value.shallow_clone())
    }

    /// The accumulated f32 gradient; None where frozen or where nothing arrived.
    pub fn gradient(&self) -> Option<Tensor> {
        match (&self.gradient, &self.master) {
            (Some(buffer), _) => Some(buffer.shallow_clone()),
            (None, Some(leaf)) => Some(leaf.grad()).filter(Tensor::defined),
            _ => None,
        }
    }

    pub fn zero_gradient(&mut self) -> Result<()> {
        if let Some(buffer) = &mut self.gradient {
            let _ = buffer.f_zero_()?;
        } else if let Some(master) = &mut self.master {
            let mut gradient = master.grad();
            if gradient.defined() {
                let _ = gradient.f_zero_()?;
            }
        }
        Ok(())
    }

    /// Rounds the master into the value after an optimizer step.
    pub fn refresh(&mut self) -> Result<()> {
        if let Some(master) = &self.master
            && self.value.kind() != Kind::Float
        {
            self.value.f_copy_(&master.detach())?;
        }
        Ok(())
    }

    /// Moves the value of a frozen parameter.
    pub fn move_to(&mut self, device: Device) -> Result<()> {
        self.value = self.value.f_to_device(device)?;
        Ok(())
    }

    /// Overwrites the parameter (resume, loading). `tensor`: any float dtype, the same shape.
    pub fn assign(&mut self, tensor: &Tensor) -> Result<()> {
        if let Some(master) = &self.master {
            master.detach().f_copy_(tensor)?;
        }
        self.value.f_copy_(tensor)?;
        Ok(())
    }
}
