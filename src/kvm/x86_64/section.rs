//! State of KVM as sections: a structure filled from KVM, walked by its table, and written to KVM.
#![allow(unsafe_code, reason = "tables are walked by address; the structure is a local of the very function")]

use std::sync::Arc;

use super::Kvm;
use super::state::State;
use crate::error::{Error, Result};
use crate::section::codec;
use crate::section::staged::describe;
use crate::section::table::Checked;
use crate::section::{Apply, Part, Section};
use crate::wire::input::Input;
use crate::wire::shape::Shape;

/// How a structure gets out of KVM and into it.
pub(super) trait Transfer: State {
    fn capture(kvm: &Kvm, index: usize) -> Result<Box<Self>>;
    fn apply(self: Box<Self>, kvm: &Kvm, index: usize) -> Result<()>;
    /// Gets ready for either of them, soon.
    fn warm(_kvm: &Kvm, _index: usize) {}
}

pub(super) struct KvmSection<S> {
    kvm: Arc<Kvm>,
    table: Checked,
    index: usize,
    state: std::marker::PhantomData<S>,
}

impl<S: Transfer> KvmSection<S> {
    pub(super) fn new(kvm: Arc<Kvm>, index: usize) -> Result<Self> {
        Ok(Self { kvm, table: S::table().checked()?, index, state: std::marker::PhantomData })
    }

    fn name(&self) -> String {
        format!("{}/{}", S::NAME, self.index)
    }
}

impl<S: Transfer> Section for KvmSection<S> {
    fn about_to_switch(&self) {
        S::warm(&self.kvm, self.index);
    }

    fn complete(&self, out: &mut Vec<u8>) -> Result<()> {
        let mut state = S::capture(&self.kvm, self.index).map_err(|error| error.in_section(self.name()))?;
        let base = (&raw mut *state).cast();
        // SAFETY: `base` is a whole S, S's table is made from its own members and has no pointers, and nobody else
        // knows the value.
        unsafe { codec::save(&self.table, base, out) }
    }

    fn parse<'a>(&'a self, part: Part, version: u32, input: &mut dyn Input) -> Result<Apply<'a>> {
        if part != Part::Full {
            return Err(Error::invalid("KVM state comes in one piece (FULL)").in_section(self.name()));
        }
        let staged = codec::parse(&self.table, version, input)?;
        Ok(Box::new(move || {
            let mut state = Box::<S>::default();
            let base = (&raw mut *state).cast();
            // SAFETY: as for saving: a whole S of our own, plain data in which every bit pattern is a value.
            unsafe { staged.apply(base) }?;
            state.apply(&self.kvm, self.index).map_err(|error| error.in_section(self.name()))
        }))
    }

    fn shape(&self, version: u32, peer: Option<&Shape>) -> Shape {
        self.table.shape(version, peer)
    }

    fn describe(&self, body: &[u8]) -> serde_json::Value {
        describe(&self.table, body).unwrap_or_else(
            |_| serde_json::json!({"fields": [{"name": "data", "type": "buffer", "size": body.len()}]}),
        )
    }
}
