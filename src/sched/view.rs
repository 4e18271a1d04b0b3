//! What a policy sees: models and devices at the moment when one device can take another unit.

/// A model's number, in the order in which models were added.
pub type ModelId = u16;

/// The most models that can be numbered.
pub const MOST_MODELS: usize = ModelId::MAX as usize + 1;

/// A device's number.
pub type DeviceId = u16;

/// Who has claimed a model's units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nobody: its next unit may start anywhere.
    Idle,
    /// This device has all of its claimed units in its queue; only there may the next one follow them.
    By(DeviceId),
    /// No unit is available: the model has ended, or waits for its data.
    Away,
}

/// A model as a policy sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelView {
    /// Its number, which is also its index in [`View::models`].
    pub id: ModelId,
    /// Who has claimed its units.
    pub claim: Claim,
    /// The one device that may run its next unit, where its state is at home on a device.
    pub pinned: Option<DeviceId>,
    /// Predicted seconds, on a device of speed 1, of all remaining units; claimed ones are left out.
    pub remaining_secs: f64,
    /// The part of those seconds that must run one after another even if each microbatch goes on to the next unit as
    /// soon as it can.
    pub remaining_chain_secs: f64,
    /// Predicted seconds between the same units in which it can run nowhere, while its weights are on their way home
    /// and back.
    pub remaining_wait_secs: f64,
    /// Bytes of weights that the same units fetch where no slot holds them.
    pub remaining_bytes: u64,
    /// The next unit's shard.
    pub shard: u16,
    /// The next unit's number in its step, from 0.
    pub unit: u16,
    /// Units of a step.
    pub units: u16,
    /// The next unit's compute, in seconds on a device of speed 1.
    pub unit_secs: f64,
    /// The number of microbatches in that unit, each an equal part of it.
    pub microbatches: u32,
    /// Bytes of weights that the next unit fetches, unless the device holds its shard ([`DeviceView::held`]).
    pub weight_bytes: u64,
    /// Bytes of boundary tensors that it takes in, where units run on any device.
    pub boundary_bytes: u64,
    /// The part of those bytes that the asking device ([`View::device`]) still holds: the tensors were computed there
    /// or fetched before, and have not been overwritten.
    pub here_bytes: u64,
    /// Predicted seconds until those weights are updated, at home, and could have been fetched.
    pub weights_ready_secs: f64,
    /// Predicted seconds until those boundary tensors are at home and could have been fetched.
    pub boundary_ready_secs: f64,
    /// Predicted seconds until the first microbatch's boundary tensor is available: the unit may begin then, while its
    /// predecessor still runs on another device.
    pub first_ready_secs: f64,
    /// Bytes that leave the device after the next unit.
    pub leave_bytes: u64,
    /// Whether gradients are among those, so that the unit needs one of the device's gradient slots
    /// ([`DeviceView::gradients_secs`]).
    pub leaves_gradients: bool,
    /// Where its last claimed unit ran or will run.
    pub last_device: Option<DeviceId>,
}

impl ModelView {
    /// A model with nothing to do.
    pub fn away(id: ModelId) -> ModelView {
        ModelView {
            id,
            claim: Claim::Away,
            pinned: None,
            remaining_secs: 0.0,
            remaining_chain_secs: 0.0,
            remaining_wait_secs: 0.0,
            remaining_bytes: 0,
            shard: 0,
            unit: 0,
            units: 1,
            unit_secs: 0.0,
            microbatches: 1,
            weight_bytes: 0,
            boundary_bytes: 0,
            here_bytes: 0,
            weights_ready_secs: 0.0,
            boundary_ready_secs: 0.0,
            first_ready_secs: 0.0,
            leave_bytes: 0,
            leaves_gradients: false,
            last_device: None,
        }
    }
}

/// A device as a policy sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceView {
    /// Its number, which is also its index in [`View::devices`].
    pub id: DeviceId,
    /// Its compute rate relative to that of the first device.
    pub speed: f64,
    /// Those of the models' next shards that its weight slots hold, up to date.
    pub held: Vec<(ModelId, u16)>,
    /// Units in its queue, the running one included.
    pub claimed: usize,
    /// Predicted seconds until its queue has run.
    pub busy_secs: f64,
    /// Bytes per second to it.
    pub h2d_bytes_per_sec: f64,
    /// Predicted seconds until all copies requested to it have arrived.
    pub h2d_secs: f64,
    /// Predicted seconds until one of its gradient slots is free again.
    pub gradients_secs: f64,
}

/// The moment of a choice.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The device that can take another unit.
    pub device: DeviceId,
    /// The number of choices made before.
    pub choices: u64,
    /// The model that was chosen last, by any device.
    pub last: Option<ModelId>,
    /// All models, by number.
    pub models: &'a [ModelView],
    /// All devices, by number.
    pub devices: &'a [DeviceView],
    /// Bytes per second that all devices' links share; `None` where each has its own.
    pub shared_bytes_per_sec: Option<f64>,
}

impl<'a> View<'a> {
    /// Whether the device may take this model's next unit.
    pub fn may_take(&self, model: &ModelView) -> bool {
        let free = match model.claim {
            Claim::Idle => true,
            Claim::By(device) => device == self.device,
            Claim::Away => false,
        };
        free && model.pinned.is_none_or(|device| device == self.device)
    }

    /// Whether this model's next unit may follow, on the asking device, one that another device has: its weights are
    /// fetched meanwhile, and each microbatch goes on as soon as it has left the other device.
    pub fn may_follow(&self, model: &ModelView) -> bool {
        let elsewhere = matches!(model.claim, Claim::By(device) if device != self.device);
        elsewhere && model.pinned.is_none_or(|device| device == self.device)
    }

    /// The models whose next unit the device may take, by number.
    pub fn candidates(&self) -> impl Iterator<Item = &'a ModelView> {
        let view = *self;
        self.models.iter().filter(move |model| view.may_take(model))
    }

    /// The models whose next unit may follow one on another device, by number. Only for policies that pipeline.
    pub fn followers(&self) -> impl Iterator<Item = &'a ModelView> {
        let view = *self;
        self.models.iter().filter(move |model| view.may_follow(model))
    }

    /// The device that can take another unit.
    pub fn asking(&self) -> &'a DeviceView {
        &self.devices[usize::from(self.device)]
    }
}

/// Chooses which model's next unit a device takes.
pub trait Policy: Send {
    /// Its name, for messages and results.
    fn name(&self) -> &str;

    /// Whether it may also choose [`View::followers`], and is also asked when there are only followers.
    fn pipelines(&self) -> bool {
        false
    }

    /// Returns one of [`View::candidates`], or `None` to leave the device waiting until something ends. Called only
    /// when there is a candidate. Any other model ends the run with an error that names the policy, and so does `None`
    /// for all devices when nothing is running.
    fn choose(&self, view: &View) -> Option<ModelId>;
}
