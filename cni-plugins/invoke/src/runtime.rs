//! The verbs as a runtime calls them: each over all plugins of a list.

use std::collections::BTreeSet;
use std::path::PathBuf;

use cni_spec::{
    AddResult, AttachmentId, Command, ConfList, ContainerId, Env, Error, GC_KEY, GC_KEY_OLD,
    IfName, NetworkName, PluginConf, code, valid_attachments_value,
};
use serde_json::{Map, Value, json};

use crate::cache::Cache;
use crate::exec::{self, PLUGIN_TIMEOUT, Talk, find_plugin};
use crate::{CachedAttachment, InvokeError, load};

/// A runtime: where its configurations, plugins and cached results are.
#[derive(Debug, Clone)]
pub struct Cni {
    /// Folder of configuration lists, usually `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// Folders of plugins, usually `/opt/cni/bin`; they become `CNI_PATH`.
    pub bin_dirs: Vec<PathBuf>,
    /// Folder of the result cache, usually `/var/lib/cni`.
    pub cache_dir: PathBuf,
}

/// One container on one network, as the runtime knows it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Attachment {
    /// The container.
    pub container_id: String,
    /// Path of its network namespace. May be empty for DEL.
    pub netns: String,
    /// Its interface.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: Vec<(String, String)>,
    /// Values by capability (`portMappings`, `ips`, …); each plugin gets those it asks for.
    pub capabilities: Map<String, Value>,
}

impl Cni {
    /// The list to use: the first of the folder.
    ///
    /// # Errors
    /// Names the folder, and what is wrong with the files in it.
    pub fn load(&self) -> Result<ConfList, InvokeError> {
        load::first(&self.conf_dir)
    }

    /// The list of a name.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_named(&self, name: &NetworkName) -> Result<ConfList, InvokeError> {
        load::named(&self.conf_dir, name)
    }

    /// All lists of the folder, and what is wrong with files that are none.
    ///
    /// # Errors
    /// Only if the folder cannot be read.
    pub fn load_all(&self) -> Result<(Vec<ConfList>, Vec<String>), InvokeError> {
        load::all(&self.conf_dir)
    }

    /// Attachments that ADD made and no DEL has ended.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn cached(&self) -> Result<Vec<CachedAttachment>, InvokeError> {
        self.cache().all()
    }

    /// ADD: plugins in order, each with the result of the one before. The runtime owes DEL after a failure too.
    ///
    /// # Errors
    /// The first plugin's that failed.
    pub fn add(&self, list: &ConfList, attachment: &Attachment) -> Result<AddResult, InvokeError> {
        let (id, env) = self.prepare(list, attachment, Command::Add)?;
        let _shared = self.cache().lock(false)?;
        let mut result: Option<(AddResult, Value)> = None;
        for plugin in &list.plugins {
            let prev = result.as_ref().map(|(_, value)| value);
            let conf = request_conf(list, plugin, &attachment.capabilities, prev);
            let failed = |error| plugin_error(list, plugin, Command::Add, error);
            let answer = self.run(list, plugin, &env, &conf)?.ok_or_else(|| {
                failed(Error::new(code::DECODE, "the plugin answered without a result"))
            })?;
            let added = AddResult::from_value(&answer, list.version).map_err(failed)?;
            // In the version of the list, whatever the plugin answered in.
            let value = added.to_value(list.version).map_err(failed)?;
            result = Some((added, value));
        }
        let Some((result, value)) = result else {
            let error = Error::new(code::INVALID_CONFIG, "the list names no plugin");
            return Err(InvokeError::Refused { network: list.name.clone(), error });
        };
        self.cache().store(list, &id, attachment, value)?;
        Ok(result)
    }

    /// DEL: plugins in reverse order, each with the final result of ADD as far as it is known. Safe to repeat.
    ///
    /// # Errors
    /// The first plugin's that failed; the cached result stays for the next try.
    pub fn del(&self, list: &ConfList, attachment: &Attachment) -> Result<(), InvokeError> {
        let _shared = self.cache().lock(false)?;
        self.del_locked(list, attachment)
    }

    fn del_locked(&self, list: &ConfList, attachment: &Attachment) -> Result<(), InvokeError> {
        let (id, env) = self.prepare(list, attachment, Command::Del)?;
        let cached = self.cache().find(&list.name, &id)?;
        // DEL is to get what ADD got. A runtime that was restarted may not know it any more; the cache does.
        let remembered = cached.as_ref().map(|cached| &cached.attachment.capabilities);
        let capabilities = match remembered {
            Some(remembered) if attachment.capabilities.is_empty() => remembered,
            _ => &attachment.capabilities,
        };
        let prev = cached.as_ref().and_then(|cached| cached.result.as_ref());
        let prev = prev.filter(|_| list.version.has_check());
        for plugin in list.plugins.iter().rev() {
            self.run(list, plugin, &env, &request_conf(list, plugin, capabilities, prev))?;
        }
        self.cache().remove(&list.name, &id)
    }

    /// CHECK: plugins in order, each with the final result of ADD.
    ///
    /// # Errors
    /// The first plugin's that found a difference; code 1 for a list older than CHECK; code 3 for an attachment
    /// that the cache does not know.
    pub fn check(&self, list: &ConfList, attachment: &Attachment) -> Result<(), InvokeError> {
        let (id, env) = self.prepare(list, attachment, Command::Check)?;
        if list.disable_check {
            return Ok(());
        }
        let refused = |error| InvokeError::Refused { network: list.name.clone(), error };
        if !list.version.has_check() {
            let msg = format!("\"cniVersion\" is \"{}\", which has no CHECK", list.version);
            return Err(refused(Error::new(code::INCOMPATIBLE_VERSION, msg)));
        }
        let _shared = self.cache().lock(false)?;
        let Some(cached) = self.cache().find(&list.name, &id)? else {
            let msg = format!("no result of ADD is known for {id}");
            return Err(refused(Error::new(code::UNKNOWN_CONTAINER, msg)));
        };
        for plugin in &list.plugins {
            let capabilities = if attachment.capabilities.is_empty() {
                &cached.attachment.capabilities
            } else {
                &attachment.capabilities
            };
            let conf = request_conf(list, plugin, capabilities, cached.result.as_ref());
            self.run(list, plugin, &env, &conf)?;
        }
        Ok(())
    }

    /// GC: first DEL for every cached attachment that is not valid any more, then the plugins' own GC for what
    /// no cache knows of. Goes on past failures.
    ///
    /// # Errors
    /// All failures together.
    pub fn gc(&self, list: &ConfList, valid: &[AttachmentId]) -> Result<(), InvokeError> {
        if list.disable_gc {
            return Ok(());
        }
        let _exclusive = self.cache().lock(true)?;
        let mut errors = Vec::new();
        let alive: BTreeSet<&AttachmentId> = valid.iter().collect();
        for cached in self.cache().all()? {
            if cached.network == list.name && !alive.contains(&cached.id) {
                errors.extend(self.del_locked(list, &cached.attachment).err());
            }
        }
        if list.version.has_gc_and_status() {
            let env = self.env(Command::Gc);
            for plugin in &list.plugins {
                let mut conf = request_conf(list, plugin, &Map::new(), None);
                for key in [GC_KEY, GC_KEY_OLD] {
                    conf.insert(key.to_owned(), valid_attachments_value(valid));
                }
                errors.extend(self.run(list, plugin, &env, &conf).err());
            }
        }
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(InvokeError::Several(errors)),
        }
    }

    /// STATUS: whether an ADD could be served now. Lists older than STATUS count as ready.
    ///
    /// # Errors
    /// The first plugin's that is not ready.
    pub fn status(&self, list: &ConfList) -> Result<(), InvokeError> {
        if list.version.has_gc_and_status() {
            let env = self.env(Command::Status);
            for plugin in &list.plugins {
                self.run(list, plugin, &env, &request_conf(list, plugin, &Map::new(), None))?;
            }
        }
        Ok(())
    }

    /// VERSION of every plugin: whether each is there and speaks the list's version.
    ///
    /// # Errors
    /// The first plugin's that is missing, or code 1 for one that does not speak it.
    pub fn validate(&self, list: &ConfList) -> Result<(), InvokeError> {
        let env = self.env(Command::Version);
        for plugin in &list.plugins {
            let conf = Map::from_iter([("cniVersion".to_owned(), json!(list.version.as_str()))]);
            let answer = self.run(list, plugin, &env, &conf)?.unwrap_or_default();
            let spoken = answer.get("supportedVersions").and_then(Value::as_array);
            if !spoken.is_some_and(|all| all.iter().any(|one| one == list.version.as_str())) {
                let msg = format!("it does not speak version {}", list.version);
                let error = Error::new(code::INCOMPATIBLE_VERSION, msg);
                return Err(plugin_error(list, plugin, Command::Version, error));
            }
        }
        Ok(())
    }

    fn cache(&self) -> Cache<'_> {
        Cache::new(&self.cache_dir)
    }

    /// Checks an attachment and makes the variables of a call about it.
    fn prepare(
        &self,
        list: &ConfList,
        attachment: &Attachment,
        command: Command,
    ) -> Result<(AttachmentId, Env), InvokeError> {
        let refused = |error| InvokeError::Refused { network: list.name.clone(), error };
        let container_id = ContainerId::new(attachment.container_id.as_str())
            .map_err(|error| refused(error.into_env_error("CNI_CONTAINERID")))?;
        let ifname = IfName::new(attachment.ifname.as_str())
            .map_err(|error| refused(error.into_env_error("CNI_IFNAME")))?;
        let mut env = self.env(command);
        env.container_id = container_id.to_string();
        env.ifname = ifname.to_string();
        env.netns.clone_from(&attachment.netns);
        env.args = join_args(&attachment.args).map_err(refused)?;
        Ok((AttachmentId { container_id, ifname }, env))
    }

    fn env(&self, command: Command) -> Env {
        let dirs: Vec<_> = self.bin_dirs.iter().map(|dir| dir.to_string_lossy()).collect();
        Env { command: command.to_string(), path: dirs.join(":"), ..Env::default() }
    }

    fn run(
        &self,
        list: &ConfList,
        plugin: &PluginConf,
        env: &Env,
        conf: &Map<String, Value>,
    ) -> Result<Option<Value>, InvokeError> {
        let answer = find_plugin(&plugin.plugin, &self.bin_dirs).and_then(|program| {
            let stdin = serde_json::to_vec(conf)
                .map_err(|error| Error::internal(&error).context("encode configuration"))?;
            exec::run(&program, env, &stdin, Talk::Keep, PLUGIN_TIMEOUT)
        });
        answer.map_err(|error| InvokeError::Plugin {
            network: list.name.clone(),
            plugin: plugin.plugin.clone(),
            // Our own variable, so it is one of the verbs.
            command: env.command.parse().unwrap_or(Command::Version),
            error,
        })
    }
}

fn plugin_error(
    list: &ConfList,
    plugin: &PluginConf,
    command: Command,
    error: Error,
) -> InvokeError {
    InvokeError::Plugin {
        network: list.name.clone(),
        plugin: plugin.plugin.clone(),
        command,
        error,
    }
}

/// `KEY=VALUE` joined by `;`, which therefore neither may have.
fn join_args(args: &[(String, String)]) -> Result<String, Error> {
    let mut joined = Vec::new();
    for (key, value) in args {
        if key.is_empty() || key.contains(['=', ';', '\0']) || value.contains([';', '\0']) {
            let msg = format!("CNI_ARGS: {key:?} = {value:?} cannot be said in it");
            return Err(Error::new(code::INVALID_ENVIRONMENT, msg));
        }
        joined.push(format!("{key}={value}"));
    }
    Ok(joined.join(";"))
}

/// The configuration one plugin gets (CNI spec 1.1.0 §3, "Deriving request configuration from plugin
/// configuration").
fn request_conf(
    list: &ConfList,
    plugin: &PluginConf,
    capabilities: &Map<String, Value>,
    prev: Option<&Value>,
) -> Map<String, Value> {
    let mut conf = plugin.raw.clone();
    conf.insert("cniVersion".to_owned(), json!(list.version.as_str()));
    conf.insert("name".to_owned(), json!(list.name.as_str()));
    conf.shift_remove("capabilities");
    let wanted: Map<String, Value> = capabilities
        .iter()
        .filter(|(key, _)| plugin.wants(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if !wanted.is_empty() {
        conf.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    if let Some(prev) = prev {
        conf.insert("prevResult".to_owned(), prev.clone());
    }
    conf
}

#[cfg(test)]
mod tests;
