//! Delegation: a plugin calls another one (CNI spec 1.1.0 §4).

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;

use cni_spec::{AddResult, Command, Env, Error, Version, code};
use serde_json::{Map, Value};

use crate::exec::{self, PLUGIN_TIMEOUT, Talk, find_program};

/// A plugin that is part of this program: its name, and the call `cni_skel::call` makes of it.
pub type Builtin = (&'static str, fn(&Env, &[u8]) -> Result<Option<Value>, Error>);

/// Calls delegates with the variables of the call that is being answered.
#[derive(Clone, Copy)]
pub struct Delegate<'a> {
    env: &'a Env,
    builtins: &'a [Builtin],
}

impl<'a> Delegate<'a> {
    /// For the call with these variables. `builtins` may be empty.
    #[must_use]
    pub fn new(env: &'a Env, builtins: &'a [Builtin]) -> Self {
        Self { env, builtins }
    }

    /// ADD. When it fails, the delegate's DEL is run before this returns.
    ///
    /// # Errors
    /// The delegate's.
    pub fn add(&self, plugin: &str, conf: &Map<String, Value>) -> Result<AddResult, Error> {
        let version = Version::of_conf(conf)?;
        let added = self.call(plugin, Command::Add, conf).and_then(|answer| match answer {
            Some(answer) => AddResult::from_value(&answer, version),
            None => {
                Err(Error::new(code::DECODE, format!("{plugin} answered ADD without a result")))
            }
        });
        if let Err(error) = &added {
            // Not after "you have it already": that lease belongs to the attachment that is alive.
            if error.code != code::ALREADY_ATTACHED
                && let Err(left) = self.del(plugin, conf)
            {
                eprintln!("DEL of {plugin} after its failed ADD: {left}");
            }
        }
        added
    }

    /// DEL.
    ///
    /// # Errors
    /// The delegate's.
    pub fn del(&self, plugin: &str, conf: &Map<String, Value>) -> Result<(), Error> {
        self.call(plugin, Command::Del, conf).map(drop)
    }

    /// CHECK.
    ///
    /// # Errors
    /// The delegate's.
    pub fn check(&self, plugin: &str, conf: &Map<String, Value>) -> Result<(), Error> {
        self.call(plugin, Command::Check, conf).map(drop)
    }

    /// GC; the configuration carries the valid attachments.
    ///
    /// # Errors
    /// The delegate's.
    pub fn gc(&self, plugin: &str, conf: &Map<String, Value>) -> Result<(), Error> {
        self.call(plugin, Command::Gc, conf).map(drop)
    }

    /// STATUS.
    ///
    /// # Errors
    /// The delegate's.
    pub fn status(&self, plugin: &str, conf: &Map<String, Value>) -> Result<(), Error> {
        // Without the plugin no ADD can work, whatever else is wrong with it.
        find_program(plugin, &self.env.path_dirs())
            .map_err(|error| Error { code: code::NOT_AVAILABLE, ..error })?;
        self.call(plugin, Command::Status, conf).map(drop)
    }

    fn call(
        &self,
        plugin: &str,
        command: Command,
        conf: &Map<String, Value>,
    ) -> Result<Option<Value>, Error> {
        let (program, meta) = find_program(plugin, &self.env.path_dirs())?;
        let env = self.env.with_command(command);
        let stdin = serde_json::to_vec(conf)
            .map_err(|error| Error::internal(&error).context("encode configuration"))?;
        // One executable holds all our plugins. If the name on CNI_PATH is this very file, a second process
        // would run the same code with the same input and cost a fork, an exec and the start of the program: the
        // call is made here instead. If somebody put another program under that name, it is the one that is run.
        let builtin = self.builtins.iter().find(|(name, _)| *name == plugin);
        let answer = match builtin {
            Some((_, call)) if is_this_program(&meta) => call(&env, &stdin),
            _ => exec::run(&program, &env, &stdin, Talk::Inherit, PLUGIN_TIMEOUT),
        };
        answer.map_err(|error| error.context(plugin))
    }
}

fn is_this_program(program: &Metadata) -> bool {
    let own = fs::metadata("/proc/self/exe");
    own.is_ok_and(|own| (own.dev(), own.ino()) == (program.dev(), program.ino()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::exec::tests::script;

    fn builtin(env: &Env, stdin: &[u8]) -> Result<Option<Value>, Error> {
        let conf: Value = serde_json::from_slice(stdin).expect("JSON");
        match env.command.as_str() {
            "ADD" => Ok(Some(json!({"cniVersion": "1.0.0", "inside": true}))),
            "STATUS" => Err(Error::new(code::NOT_AVAILABLE, conf["name"].to_string())),
            _ => Ok(None),
        }
    }

    const BUILTINS: &[Builtin] = &[("helper", builtin)];

    fn conf() -> Map<String, Value> {
        json!({"cniVersion": "1.0.0", "name": "n"}).as_object().expect("object").clone()
    }

    #[test]
    fn this_very_program_is_called_without_a_process_and_another_one_is_run() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let env = Env { path: dir.path().display().to_string(), ..Env::default() };
        let delegate = Delegate::new(&env, BUILTINS);
        let missing = delegate.add("helper", &conf()).expect_err("not on CNI_PATH");
        assert!(missing.msg.contains("helper"));

        let own = std::env::current_exe().expect("own executable");
        std::os::unix::fs::symlink(own, dir.path().join("helper")).expect("link");
        let result = delegate.add("helper", &conf()).expect("added");
        assert_eq!(result.extra["inside"], true);
        assert_eq!(delegate.status("helper", &conf()).expect_err("50").code, code::NOT_AVAILABLE);
        delegate.del("helper", &conf()).expect("deleted");

        std::fs::remove_file(dir.path().join("helper")).expect("removed");
        script(dir.path(), "helper", r#"echo "{\"outside\":\"$CNI_COMMAND\"}""#);
        let result = delegate.add("helper", &conf()).expect("added");
        assert_eq!(result.extra["outside"], "ADD");
    }

    #[test]
    fn a_failed_add_is_followed_by_del() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let log = dir.path().join("log");
        let body = |code: u32| {
            let log = log.display();
            format!(
                r#"echo $CNI_COMMAND >> {log}; [ $CNI_COMMAND = DEL ] || {{ echo '{{"code":{code},"msg":"m"}}'; exit 1; }}"#
            )
        };
        let env = Env { path: dir.path().display().to_string(), ..Env::default() };
        script(dir.path(), "ipam", &body(100));
        Delegate::new(&env, &[]).add("ipam", &conf()).expect_err("fails");
        assert_eq!(std::fs::read_to_string(&log).expect("log"), "ADD\nDEL\n");

        script(dir.path(), "ipam", &body(code::ALREADY_ATTACHED));
        Delegate::new(&env, &[]).add("ipam", &conf()).expect_err("fails");
        let log = std::fs::read_to_string(&log).expect("log");
        assert_eq!(log, "ADD\nDEL\nADD\n", "the lease of a living attachment stays");
    }
}
